"""Reads the tensors of a weight file one by one, when asked for: PyTorch's .pth and .bin, .safetensors, or a Hugging
Face directory with either one .safetensors file or shards and their index. No pickled code is ever run.
"""

import dataclasses
import json
import pickle
from collections.abc import Callable

import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16
import numpy as np
import safetensors
from etils import epath

from refiner_export.settings import UserError, require

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_REMEDY = "Download or save it again"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that still lies in its file, where it is called `name`; `read` fetches it."""
  name: str
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def holds_weights(path: epath.Path) -> bool:
  """Whether `read_tensors` would read this path, a file or a directory."""
  return path.is_file() or (path / SINGLE).exists() or (path / INDEX).exists()


def read_tensors(path: epath.Path) -> dict[str, Tensor]:
  """All tensors by name. Raises `UserError` for a file that is broken, or that holds anything but tensors."""
  if (path / INDEX).exists():
    return _read_shards(path)
  if path.is_dir():
    return _read_safetensors(path / SINGLE)
  return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: epath.Path) -> dict[str, Tensor]:
  try:
    file = safetensors.safe_open(path, framework="numpy")
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{path} is not a whole .safetensors file ({_first_line(error)}). {_REMEDY}") from None
  return {name: Tensor(name, tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name))
          for name in file.keys()}


def _read_shards(directory: epath.Path) -> dict[str, Tensor]:
  try:
    shard_of = json.loads((directory / INDEX).read_text())["weight_map"]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{directory / INDEX} is not an index of shards ({_first_line(error)}). {_REMEDY}") from None
  shards = {name: _read_safetensors(directory / name) for name in sorted(set(shard_of.values()))}
  for name, shard in shard_of.items():
    require(name in shards[shard], f"{directory / shard} has no tensor {name}, which {INDEX} places there. {_REMEDY}")
  return {name: shards[shard][name] for name, shard in shard_of.items()}


def _read_torch(path: epath.Path) -> dict[str, Tensor]:
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
  numbers = lambda tensor: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
  return {name: Tensor(name, tuple(tensor.shape), lambda tensor=tensor: numbers(tensor.detach()))
          for name, tensor in state.items()}


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]
