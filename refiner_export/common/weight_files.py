"""Reads the weight files that other projects publish. No code inside a file is ever run.

Known forms: PyTorch's .pth, .pt and .bin files, .safetensors files, and directories in Hugging Face's form, which hold
one file or several shards with an index. There are two ways to read:

  read_tensors      NumPy arrays, one tensor or a part of a tensor at a time. Needs no torch for .safetensors.
  load_state_dict   all tensors of one file as torch tensors.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import pickle
import re
import tempfile
import typing
import zipfile
from collections.abc import Callable, Mapping

import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16
import numpy as np
import safetensors
from etils import epath

from refiner_export.common.files import hash_file, is_local
from refiner_export.common.settings import UserError, require

if typing.TYPE_CHECKING:
  import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Names of the single file and of the index of shards in a directory. The first layout that is found is read.
_LAYOUTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_SUFFIXES = ".pth", ".pt", ".bin", ".safetensors"
SAFETENSORS_DTYPES = {  # NumPy's names -> the names in .safetensors files
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"}
_NUMPY_DTYPES = {stored: np.dtype(name) for name, stored in SAFETENSORS_DTYPES.items()}
Index = tuple[slice, ...]
_REMEDY = "Download or save it again"


# --- one file, as torch tensors ---

def sha256(path: epath.PathLike) -> str:
  """SHA-256 in hex of a local or remote file. Raises `UserError` when there is no such file."""
  return hash_file(_existing_file(path))


def load_state_dict(path: epath.PathLike) -> dict[str, "torch.Tensor"]:
  """The named tensors of a file, on the CPU, in the precision they were saved in.

  Tensors are mapped from the file where its form allows that. A tensor that is never used is then never read; a .pth
  file often carries the optimizer's state too. The file must not change while the tensors are in use.

  Args:
    path: local or remote; a .pth, .pt or .bin file with tensors, alone or under the key `model`, or a .safetensors
      file.

  Raises:
    UserError: there is no such file; the file has another form; it is cut off or damaged; it could only be opened by
      running code in it; it holds something else than tensors.
  """
  file = _existing_file(path)
  require(file.suffix in _SUFFIXES, f"{path}: expected a file of weights, one of {', '.join(_SUFFIXES)}")
  if is_local(path):
    return _load_file(pathlib.Path(file), path)
  with tempfile.TemporaryDirectory() as folder:  # a mapped file stays readable after its name is removed
    local = pathlib.Path(folder) / file.name
    try:
      file.copy(local)
    except OSError as error:
      raise _unreadable(path, error) from None
    return _load_file(local, path)


def _existing_file(path: epath.PathLike) -> epath.Path:
  file = epath.Path(path)
  require(file.exists(), f"{path}: no such file")
  require(not file.is_dir(), f"{path} is a directory: name the file in it")
  return file


def _load_file(file: pathlib.Path, shown: epath.PathLike) -> dict[str, "torch.Tensor"]:
  """As `load_state_dict`, for a local file that errors call `shown`."""
  if file.suffix != ".safetensors":
    return _load_pickled(file, shown)
  _import_torch(shown)
  from safetensors.torch import load_file
  try:
    tensors = load_file(file)
  except safetensors.SafetensorError as error:
    raise _damaged(file, shown, error) from None
  except OSError as error:
    raise _unreadable(shown, error) from None
  require(len(tensors) > 0, f"{shown} holds no tensors: name a file of weights")
  return tensors


def _load_pickled(file: pathlib.Path, shown: epath.PathLike) -> dict[str, "torch.Tensor"]:
  """The tensors of a file that torch saved, mapped where torch can do that."""
  torch = _import_torch(shown)
  try:
    mappable = zipfile.is_zipfile(file)  # torch before 1.6 wrote another form, which cannot be mapped
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
  except pickle.UnpicklingError as error:
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
      raise UserError(f"{shown} could only be opened by running code in it ({code[1]}), which is never done: "
                      "get the original file again, or save only its tensors as .safetensors") from None
    raise _damaged(file, shown, error) from None
  except OSError as error:
    raise _unreadable(shown, error) from None
  except MemoryError:
    raise
  except Exception as error:  # damaged bytes can raise any exception
    raise _damaged(file, shown, error) from None
  return _only_tensors(content, shown)


def _only_tensors(content, shown: epath.PathLike) -> dict[str, "torch.Tensor"]:
  """The named tensors of what a file holds. LAVIS and RAM++ put them under `model`, beside the optimizer and more."""
  import torch
  if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
    content = content["model"]
  require(isinstance(content, Mapping) and len(content) > 0,
          f"{shown} holds {type(content).__name__}, expected named tensors: name a file of weights")
  for name, tensor in content.items():
    require(isinstance(tensor, torch.Tensor),
            f"{shown}: {name!r} is {type(tensor).__name__}, expected a tensor: name a file that holds weights only")
  return dict(content)


def _import_torch(shown: epath.PathLike):
  try:
    import torch
  except ImportError:
    raise UserError(f"{shown}: PyTorch is needed to read this file. pip install torch, or save the weights as "
                    ".safetensors") from None
  return torch


# --- files and directories, as NumPy arrays that are read when they are asked for ---

@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that is not in memory.

  Attributes:
    name: the tensor's name in its file.
    shape, dtype: of the array that `read` returns.
    fetch: reads the part that an index selects, one slice for each axis.
  """
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Index], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self, index: Index | None = None) -> np.ndarray:
    """The whole tensor, or the part that `index` selects. Nothing else is read from the file."""
    if index is None:
      index = (slice(None),) * len(self.shape)
    return self.fetch(index)


def holds_weights(path: epath.Path) -> bool:
  """Whether `read_tensors` would read this path, a file or a directory."""
  if path.is_file():
    return True
  for layout in _LAYOUTS:
    for name in layout:
      if (path / name).exists():
        return True
  return False


def read_tensors(path: epath.Path) -> dict[str, Tensor]:
  """All tensors of a local file or directory, by name.

  A .safetensors file is mapped to memory only while a tensor is read from it, because pages that were read count as
  memory of this process. The PyTorch file that was read last stays mapped. PyTorch's floating point tensors are read
  as float32, because NumPy alone has no bfloat16.

  Raises:
    UserError: a file is missing or broken, or holds something else than tensors.
  """
  if not path.is_dir():
    return _read_file(path)
  for single, index in _LAYOUTS:
    if (path / index).exists():
      return _read_shards(path, index)
    if (path / single).exists():
      return _read_file(path / single)
  names = ", ".join([*_LAYOUTS[0], *_LAYOUTS[1]])
  raise UserError(f"{path} has no weights in it: none of {names}")


def _read_file(path: epath.Path) -> dict[str, Tensor]:
  if path.suffix == ".safetensors":
    return _read_safetensors(path)
  return _read_pickled(path)


def _read_safetensors(path: epath.Path) -> dict[str, Tensor]:
  def fetch(name: str, index: Index) -> np.ndarray:
    with safetensors.safe_open(path, framework="numpy") as file:
      return np.asarray(file.get_slice(name)[index])

  tensors = {}
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      for name in file.keys():
        stored = file.get_slice(name)
        dtype = stored.get_dtype()
        require(dtype in _NUMPY_DTYPES,
                f"{path}: tensor {name} is of type {dtype}, which cannot be read here. Save it in float32 or bfloat16")
        shape = tuple(stored.get_shape())
        tensors[name] = Tensor(name, shape, _NUMPY_DTYPES[dtype], functools.partial(fetch, name))
  except safetensors.SafetensorError as error:
    raise _damaged(path, path, error) from None
  except OSError as error:
    raise _unreadable(path, error) from None
  return tensors


def _read_shards(directory: epath.Path, index: str) -> dict[str, Tensor]:
  """The tensors of several files. The index says which file each tensor is in, and must list all of them."""
  try:
    shard_of = dict(json.loads((directory / index).read_text())["weight_map"])
    names = sorted(set(shard_of.values()))
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{directory / index} is not an index of shards ({_first_line(error)}). {_REMEDY}") from None
  for name in names:
    beside = isinstance(name, str) and epath.Path(name).name == name and name not in ("", ".", "..")
    require(beside, f"{directory / index} names {name!r}, which is not a file beside it: nothing outside the directory "
                    "is read")
  shards = {}
  for name in names:
    shards[name] = _read_file(directory / name)
  tensors = {}
  for name, shard in shard_of.items():
    require(name in shards[shard], f"{directory / shard} has no tensor {name}, which {index} places there. {_REMEDY}")
    tensors[name] = shards[shard][name]
  for shard, found in shards.items():
    for name in found:
      require(name in shard_of, f"{directory / shard} has a tensor {name}, which {index} does not list. {_REMEDY}")
  return tensors


def _read_pickled(path: epath.Path) -> dict[str, Tensor]:
  try:
    stat = os.stat(path)
  except OSError as error:
    raise _unreadable(path, error) from None
  version = (stat.st_size, stat.st_mtime_ns)

  def as_numpy(tensor) -> np.ndarray:
    if tensor.is_floating_point():
      tensor = tensor.float()
    return tensor.detach().numpy()

  def fetch(name: str, index: Index) -> np.ndarray:
    return as_numpy(_load_once(path, version)[name][index])

  tensors = {}
  for name, tensor in _load_once(path, version).items():
    dtype = as_numpy(tensor.new_empty(0)).dtype
    tensors[name] = Tensor(name, tuple(tensor.shape), dtype, functools.partial(fetch, name))
  return tensors


@functools.lru_cache(maxsize=1)  # torch takes long to find the tensors in a file, so the last file stays mapped
def _load_once(path: epath.Path, version: tuple) -> dict[str, "torch.Tensor"]:
  """The mapped tensors of a file that torch saved; `version` changes when the file does."""
  return _load_pickled(pathlib.Path(path), path)


# --- errors ---

def _damaged(file: epath.PathLike, shown: epath.PathLike, error: Exception) -> UserError:
  suffix, size = pathlib.PurePath(file).suffix, os.stat(file).st_size
  return UserError(f"{shown} is not a whole {suffix} file of weights: it is damaged or cut off ({size} bytes; "
                   f"{_first_line(error)}). {_REMEDY}")


def _unreadable(shown: epath.PathLike, error: OSError) -> UserError:
  return UserError(f"{shown} cannot be read: {error.strerror or error}. {_REMEDY}")


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]
