"""Files of weights that other projects published: read without running anything in them, and told apart by digest."""

import hashlib
import pathlib
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping

import torch
from etils import epath
from safetensors.torch import load_file

from refiner_export.common.settings import UserError, require

_CHUNK = 1 << 22
_PICKLED = ".pth", ".pt", ".bin"
_SUFFIXES = *_PICKLED, ".safetensors"


def sha256(path: epath.PathLike) -> str:
  """SHA-256 in hex of the contents of a local or remote file, which is read piece by piece. Raises `UserError`."""
  digest = hashlib.sha256()
  with _existing(path).open("rb") as file:
    while piece := file.read(_CHUNK):
      digest.update(piece)
  return digest.hexdigest()


def load_state_dict(path: epath.PathLike) -> dict[str, torch.Tensor]:
  """The named tensors of a checkpoint, on the CPU, in the precision they were saved in.

  Tensors are mapped from the file where its form allows that: what is never used (a .pth file often carries the
  optimizer too) is never read, and the file must stay as it is while the tensors are in use.

  Args:
    path: local or remote; .pth, .pt or .bin as torch saves them, the tensors alone or under the key `model`; or
      .safetensors.

  Raises:
    UserError: no such file; another kind of file; one that is cut off or damaged; one that could only be opened by
      running code in it; one that holds something else than tensors.
  """
  source = _existing(path)
  require(source.suffix in _SUFFIXES, f"{path}: expected a file of weights, one of {', '.join(_SUFFIXES)}")
  try:
    if "://" not in str(path):
      return _read(pathlib.Path(source), path)
    with tempfile.TemporaryDirectory() as folder:  # what is mapped outlives its name
      local = pathlib.Path(folder) / source.name
      source.copy(local)
      return _read(local, path)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: epath.PathLike, remedy: str) -> None:
  """Makes the tensors the module's weights, without a copy; every name and shape must be accounted for.

  Args:
    module: may have been built on the device `meta`, so that no time goes into weights that are replaced at once.
    tensors: by the module's names.
    source: the file they come from, for the error.
    remedy: what to do about a file that does not fit, for the error.

  Raises:
    UserError: tensors are missing, unknown or of another shape; the first of them is named.
  """
  expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
  found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  missing = [name for name in expected if name not in found]
  unknown = [name for name in found if name not in expected]
  require(not missing, f"{source} lacks {_listed(missing)}. {remedy}")
  require(not unknown, f"{source} holds {_listed(unknown)}, which this model does not have. {remedy}")
  for name, shape in expected.items():
    require(found[name] == shape, f"{source}: {name} has the shape {found[name]}, expected {shape}. {remedy}")
  module.load_state_dict(dict(tensors), assign=True)


def _listed(names: list[str]) -> str:
  """The first name, and how many there are besides."""
  return "".join(names[:1]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _existing(path: epath.PathLike) -> epath.Path:
  source = epath.Path(path)
  require(source.exists(), f"{path}: no such file")
  require(not source.is_dir(), f"{path} is a directory: name the file in it")
  return source


def _read(local: pathlib.Path, path: epath.PathLike) -> dict[str, torch.Tensor]:
  """As `load_state_dict`; errors speak of `path`."""
  try:
    content = _unpickle(local) if local.suffix in _PICKLED else load_file(local)
  except pickle.UnpicklingError as error:
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
      raise UserError(f"{path} could only be opened by running code in it ({code[1]}), which is never done: "
                      "get the original file again, or its weights as .safetensors") from None
    raise _damaged(path, local) from None
  except (OSError, MemoryError):
    raise
  except Exception:  # there is no end to what damaged bytes raise
    raise _damaged(path, local) from None
  if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
    content = content["model"]
  require(isinstance(content, Mapping) and len(content) > 0,
          f"{path} holds {type(content).__name__}, expected named tensors: name a file of weights")
  for name, tensor in content.items():
    require(isinstance(tensor, torch.Tensor),
            f"{path}: {name!r} is {type(tensor).__name__}, expected a tensor: name a file that holds weights only")
  return dict(content)


def _unpickle(local: pathlib.Path):
  mappable = zipfile.is_zipfile(local)  # files from before torch 1.6 are not
  return torch.load(local, map_location="cpu", weights_only=True, mmap=mappable)


def _damaged(path: epath.PathLike, local: pathlib.Path) -> UserError:
  size = local.stat().st_size
  return UserError(f"{path} is no file of weights, or is damaged or cut off ({size} bytes): get it again")
