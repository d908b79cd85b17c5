"""An earlier run of `lyrics_jax.train`, or a directory that `from-hf` wrote, as what a run starts from."""

import numpy as np
from etils import epath

from lyrics_jax.models.base import ModelSettings
from lyrics_jax.models.layers.int8 import SCALE
from lyrics_jax.weights.stored import StoredParameters
from lyrics_jax.weights.table import PLAIN, Entry, Origin, Shapes
from refiner_export.common.settings import require
from refiner_export.common.weight_files import Index, Tensor


def is_run(path: epath.Path) -> bool:
  """Whether a path is the output directory of a run."""
  return (path / "checkpoints").is_dir()


def find(path: epath.Path, model: ModelSettings, shapes: Shapes) -> Origin:
  """What the newest checkpoint of a run has for a model with parameters of these shapes.

  Kernels that the run holds in int8 are given in float32, unless this model holds them in int8 too.

  Raises:
    UserError: there is no checkpoint, or nothing of it has a place in this model, or it has another shape.
  """
  tensors = dict(StoredParameters(str(path)).tensors)
  for scale in list(tensors):
    if scale.endswith(SCALE) and scale not in shapes:
      kernel = scale.removesuffix(SCALE)
      tensors[kernel] = _written_out(tensors[kernel], tensors.pop(scale))
  entries, left_over = {}, []
  for name, tensor in tensors.items():
    if name not in shapes:
      left_over.append(name)
      continue
    here = shapes[name].shape
    require(tensor.shape == here, f"{path}: parameter {name} has shape {tensor.shape} there, {here} here; make "
                                  "config.stage.model agree")
    entries[name] = Entry((name,), PLAIN, here)
  require(bool(entries), f"{path}: no parameter of that run has a place in this model")
  return Origin(str(path), tensors, entries, {"without a place in this model": sorted(left_over)} if left_over else {})


def _written_out(kernel: Tensor, scale: Tensor) -> Tensor:
  """The float32 kernel [..., n, m] of an int8 kernel and its scale [..., m]."""
  def fetch(index: Index) -> np.ndarray:
    columns = scale.read((*index[:-2], index[-1]))
    return kernel.read(index).astype(np.float32) * np.expand_dims(columns, -2)

  return Tensor(kernel.name, kernel.shape, np.dtype(np.float32), fetch)
