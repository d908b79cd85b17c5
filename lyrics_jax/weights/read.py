"""Reads the tensors of a weight file one by one, or parts of them, when asked for: PyTorch's .pth and .bin, .safetensors,
or a Hugging Face directory with one file of either kind, or shards and their index. No pickled code is ever run.

A file is mapped to memory only while a tensor is read from it: pages that were read count as this process's memory.
"""

import dataclasses
import functools
import json
import math
import os
import pickle
from collections.abc import Callable

import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16
import numpy as np
import safetensors
from etils import epath

from refiner_export.common.settings import UserError, require

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYOUTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))  # of a directory; the first counts
SAFETENSORS_DTYPES = {  # NumPy's names -> theirs
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"}
_NUMPY_DTYPES = {theirs: np.dtype(ours) for ours, theirs in SAFETENSORS_DTYPES.items()}
Index = tuple[slice, ...]
_REMEDY = "Download or save it again"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that is not in memory; `fetch` reads a part of it. One that lies in a file is called `name` there."""
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Index], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self, index: Index | None = None) -> np.ndarray:
    """The tensor, or the part of it that `index`, a slice per axis, selects; nothing else is read."""
    return self.fetch((slice(None),) * len(self.shape) if index is None else index)


def holds_weights(path: epath.Path) -> bool:
  """Whether `read_tensors` would read this path, a file or a directory."""
  return path.is_file() or any((path / name).exists() for layout in _LAYOUTS for name in layout)


def read_tensors(path: epath.Path) -> dict[str, Tensor]:
  """All tensors by name. Raises `UserError` for a file that is broken, or that holds anything but tensors."""
  if path.is_dir():
    for single, index in _LAYOUTS:
      if (path / index).exists():
        return _read_shards(path, index)
      if (path / single).exists():
        return _read_file(path / single)
    raise UserError(f"{path} has no weights in it: none of {', '.join(name for layout in _LAYOUTS for name in layout)}")
  return _read_file(path)


def _read_file(path: epath.Path) -> dict[str, Tensor]:
  return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: epath.Path) -> dict[str, Tensor]:
  def fetch(name: str, index: Index) -> np.ndarray:
    with safetensors.safe_open(path, framework="numpy") as file:
      return np.asarray(file.get_slice(name)[index])

  tensors = {}
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      for name in file.keys():
        tensor = file.get_slice(name)
        dtype = tensor.get_dtype()
        require(dtype in _NUMPY_DTYPES, f"{path}: tensor {name} is of type {dtype}, which cannot be read here. Save it "
                                        "in float32 or bfloat16")
        tensors[name] = Tensor(name, tuple(tensor.get_shape()), _NUMPY_DTYPES[dtype], functools.partial(fetch, name))
    return tensors
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{path} is not a whole .safetensors file ({_first_line(error)}). {_REMEDY}") from None


def _read_shards(directory: epath.Path, index: str) -> dict[str, Tensor]:
  try:
    shard_of = dict(json.loads((directory / index).read_text())["weight_map"])
    names = sorted(set(shard_of.values()))
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{directory / index} is not an index of shards ({_first_line(error)}). {_REMEDY}") from None
  for name in names:
    plain = isinstance(name, str) and epath.Path(name).name == name and name not in ("", ".", "..")
    require(plain, f"{directory / index} names {name!r}, which is not a file beside it: nothing outside the directory is "
                   "read")
  shards = {name: _read_file(directory / name) for name in names}
  for name, shard in shard_of.items():
    require(name in shards[shard], f"{directory / shard} has no tensor {name}, which {index} places there. {_REMEDY}")
  for shard, tensors in shards.items():
    for name in tensors:
      require(name in shard_of, f"{directory / shard} has a tensor {name}, which {index} does not list. {_REMEDY}")
  return {name: shards[shard][name] for name, shard in shard_of.items()}


def _read_torch(path: epath.Path) -> dict[str, Tensor]:
  try:
    stat = os.stat(path)
  except OSError as error:
    raise UserError(f"{path} cannot be read ({_first_line(error)}). {_REMEDY}") from None
  version = (stat.st_size, stat.st_mtime_ns)

  def as_numpy(tensor) -> np.ndarray:
    return (tensor.detach().float() if tensor.is_floating_point() else tensor).numpy()

  def fetch(name: str, index: Index) -> np.ndarray:
    return as_numpy(_load_torch(path, version)[name][index])

  return {name: Tensor(name, tuple(tensor.shape), as_numpy(tensor.new_empty(0)).dtype, functools.partial(fetch, name))
          for name, tensor in _load_torch(path, version).items()}


@functools.lru_cache(maxsize=1)  # to find where the tensors lie takes long, so the file that was read last stays mapped
def _load_torch(path: epath.Path, version: tuple) -> dict:
  """The mapped tensors of a file; `version` changes when the file does."""
  try:
    import torch
  except ImportError:
    raise UserError(f"{path}: PyTorch is needed to read this file. pip install torch, or save the weights as "
                    f".safetensors") from None
  try:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except pickle.UnpicklingError:
    raise UserError(f"{path} is refused: it holds pickled code, which is never run, or it is damaged. Save only its "
                    f"tensors, as .safetensors") from None
  except (RuntimeError, OSError, EOFError, ValueError) as error:
    raise UserError(f"{path} is not a whole file of torch.save ({_first_line(error)}). {_REMEDY}") from None
  state = state.get("model", state) if isinstance(state, dict) else state  # LAVIS puts the optimizer and more beside it
  require(isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values()),
          f"{path} is not a dictionary of tensors, nor has one under 'model'. Save the model's state_dict()")
  return state


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]
