"""The parameters of a run's newest checkpoint, a few layers at a time, without building the model."""

import dataclasses
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lyrics_jax.models.layers.int8 import SCALE
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from lyrics_jax.training.old_names import renamed
from lyrics_jax.training.parameters import ModelParameters
from refiner_export.common.settings import require
from refiner_export.common.weight_files import Index, Tensor
from refiner_export.records.manifest import MANIFEST


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a parameter lies, and how.

  Attributes:
    directory: of the checkpoint's parameters, or of the frozen ones.
    name: the parameter's name there, which in an old checkpoint is not today's.
    zarr3: whether the directory is in that format.
    shape, dtype: of what is stored.
    chunk: shape of the pieces that can be read by themselves.
    transposed: whether the last two axes change places on the way here; only in old checkpoints.
  """
  directory: epath.Path
  name: str
  zarr3: bool
  shape: tuple[int, ...]
  dtype: np.dtype
  chunk: tuple[int, ...]
  transposed: bool


class StoredParameters:
  """All parameters of the newest checkpoint of an output directory, trained and frozen, by path. Nothing is read yet.

  Checkpoints from before parameters were named after the parts of the model are read too: `tensors` has today's names,
  and every matrix is a kernel [n, m].

  Raises:
    UserError: there is no checkpoint.
  """

  def __init__(self, output: str):
    root = epath.Path(output).absolute()
    steps = ocp.utils.checkpoint_steps(root / "checkpoints") if (root / "checkpoints").exists() else []
    require(bool(steps), f"no checkpoint in {output}/checkpoints: the run was stopped before its first one")
    self.step = max(steps)
    self._context = ocp.type_handlers.get_ts_context()
    self._places = {}
    for directory in (root / "checkpoints" / str(self.step) / "parameters", root / "frozen"):
      if directory.exists():
        self._places |= _places(directory)
    self.tensors = {}
    for path, place in self._places.items():
      shape = (*place.shape[:-2], place.shape[-1], place.shape[-2]) if place.transposed else place.shape
      self.tensors[path] = Tensor(path, shape, place.dtype, _Fetch(self, path))

  def layers_at_once(self, path: str) -> int:
    """How many layers of a stack lie in one chunk, which can only be read together."""
    return self._places[path].chunk[0]

  def read(self, path: str, index: Index) -> np.ndarray:
    """The part of a parameter that `index` selects. Orbax' own way of reading would read the whole parameter."""
    place = self._places[path]
    if place.transposed:
      index = (*index[:-2], index[-1], index[-2])
    info = ocp.type_handlers.ParamInfo(name=place.name, parent_dir=place.directory, ts_context=self._context,
                                       use_zarr3=place.zarr3)
    specification = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
    array = tensorstore.open(specification, context=self._context).result()
    value = np.asarray(array[index].read().result())
    return value.swapaxes(-1, -2) if place.transposed else value


@dataclasses.dataclass(frozen=True)
class _Fetch:
  """Reads a part of one parameter."""
  stored: StoredParameters
  path: str

  def __call__(self, index: Index) -> np.ndarray:
    return self.stored.read(self.path, index)


def _places(directory: epath.Path) -> dict[str, _Place]:
  """By path, what Orbax knows of the arrays in a directory without reading them."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    described = checkpointer.metadata(directory).item_metadata
  places = {}
  for name, array in described.tree.items():
    path, transposed = renamed(name)
    places[path] = _Place(directory, name, described.use_zarr3, tuple(array.shape), np.dtype(array.dtype),
                          tuple(array.storage.chunk_shape or ()), transposed)
  return places


class StoredRun:
  """`config`, `parameters` (names and shapes) and `step` of a run, and the `manifest` of its records.

  The manifest is None where there are no records: weights that were converted and not trained have none. The output of
  a run from before parameters were named after the parts of the model has another configuration, and is refused.

  Raises:
    UserError: there is no such run.
  """

  def __init__(self, output: str):
    self.config = saved_config(output)
    self.stored = StoredParameters(output)
    self.step = self.stored.step
    self.parameters = ModelParameters.of(self.config)
    described = False
    for place in (output, self.config.data.records):
      described = described or (epath.Path(place) / MANIFEST).exists()
    self.manifest = trained_manifest(output, self.config) if described else None
    self._layers = None, None  # the layers that were read last: (path, first, merged), values

  def dtype(self, path: str) -> np.dtype:
    """The dtype in which `read` gives a parameter."""
    return np.dtype(ml_dtypes.bfloat16 if self._scale_of(path) else self.parameters.shapes[path].dtype)

  def read(self, path: str, layer: int | None = None, merged: bool = False) -> np.ndarray:
    """A parameter, or one layer of a stack, as stored. A kernel in int8 is written out in bfloat16.

    Layers that lie in one chunk are read together and kept until others are asked for, so ask for them in order. Where
    `from_hf` wrote them, a chunk has one layer; where a run did, it may have all of them.

    Args:
      merged: whether LoRA is added to its kernels: W + alpha / r A B in float32, rounded to W's dtype.
    """
    if layer is None:
      return self._finished(path, slice(None), merged)
    count = self.stored.layers_at_once(path)
    first = layer // count * count
    if self._layers[0] != (path, first, merged):
      self._layers = None, None  # these layers need not be in memory together with the next ones
      self._layers = (path, first, merged), self._finished(path, slice(first, first + count), merged)
    return self._layers[1][layer - first]

  def _finished(self, path: str, layers: slice, merged: bool) -> np.ndarray:
    """Layers of a kernel [L, n, m] with its scale [L, m] and its factors [L, n, r] and [L, r, m], where it has them."""
    value = self._read_layers(path, layers)
    scale = [self._read_layers(each, layers) for each in self._scale_of(path)]
    factors = [self._read_layers(each, layers) for each in self._lora_of(path)] if merged else []
    if not scale and not factors:
      return value
    result = np.empty(value.shape, self.dtype(path))
    for layer, matrix in enumerate(value):  # one layer at a time is in float32
      matrix = matrix.astype(np.float32)
      if scale:
        matrix *= scale[0][layer]
      if factors:
        lora = self.config.stage.model.llm.lora
        matrix += lora.alpha / lora.rank * (factors[0][layer] @ factors[1][layer])
      result[layer] = matrix
    return result

  def _read_layers(self, path: str, layers: slice) -> np.ndarray:
    rank = len(self.stored.tensors[path].shape)
    return self.stored.read(path, (layers, *[slice(None)] * (rank - 1)) if rank else ())

  def _scale_of(self, path: str) -> Sequence[str]:
    """The scale of an int8 kernel; nothing for other parameters."""
    return [path + SCALE] if path + SCALE in self.parameters.shapes else []

  def _lora_of(self, path: str) -> Sequence[str]:
    """The two factors whose product is added to this parameter; nothing for most."""
    module, _, leaf = path.rpartition("/")
    factors = [f"{module}/lora_a", f"{module}/lora_b"]
    return factors if leaf == "kernel" and factors[0] in self.parameters.shapes else []
