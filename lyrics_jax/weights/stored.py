"""A run's newest checkpoint, a few layers at a time, without building the model."""

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lyrics_jax.models.quantised import SCALE, inputs_axis
from lyrics_jax.stages import make_stage
from lyrics_jax.training.checkpoint import open_run, trained_manifest
from lyrics_jax.training.parameters import ParameterPlan
from refiner_export.records.manifest import MANIFEST


class StoredRun:
  """`config`, `plan` and `step` of the run with this output directory, and the `manifest` of its records.

  The manifest is None where there are no records: of weights that were converted and not trained. Raises `UserError`
  when there is no such run.
  """

  def __init__(self, output: str):
    checkpoints, self.config = open_run(output)
    self.step = checkpoints.latest()
    checkpoints.close()
    self.plan = ParameterPlan.of(make_stage(self.config))
    root = epath.Path(output).absolute()
    described = any((epath.Path(place) / MANIFEST).exists() for place in (root, self.config.data.records))
    self.manifest = trained_manifest(output, self.config) if described else None
    self._directory_of = {True: root / "checkpoints" / str(self.step) / "parameters", False: root / "frozen"}
    self._context = ocp.type_handlers.get_ts_context()
    self._described = {trained: _describe(place) for trained, place in self._directory_of.items() if place.exists()}
    self._layers = None, None  # those that were read last: (path, first, merged), values

  def dtype(self, path: str) -> np.dtype:
    """Of a parameter as `read` gives it."""
    return np.dtype(ml_dtypes.bfloat16 if self._scale_of(path) else self.plan.shapes[path].dtype)

  def read(self, path: str, layer: int | None = None, merged: bool = False) -> np.ndarray:
    """A parameter, or one layer of a stack, as stored; kernels in int8 are written out in bfloat16.

    Layers that lie in one chunk are read together and kept until others are asked for, so ask for them in order: one
    layer at a time where `from_hf` wrote them, up to all of them where a run did.

    With `merged`, LoRA is added to its kernels: W + alpha / r A B in float32, rounded to W's dtype.
    """
    if layer is None:
      return self._finished(path, slice(None), merged)
    count = self._described[self.plan.stage.trains(path)].tree[path].storage.chunk_shape[0]
    first = layer // count * count
    if self._layers[0] != (path, first, merged):
      self._layers = None, None  # not in memory together with the next ones
      self._layers = (path, first, merged), self._finished(path, slice(first, first + count), merged)
    return self._layers[1][layer - first]

  def _finished(self, path: str, layers: slice, merged: bool) -> np.ndarray:
    """Layers of a kernel [L, n, m] or weight [L, m, n], with what it has: a scale [L, m], factors [L, n, r], [L, r, m]."""
    value = self._stored(path, layers)
    scale = [self._stored(each, layers) for each in self._scale_of(path)]
    factors = [self._stored(each, layers) for each in self._lora_of(path)] if merged else []
    if not scale and not factors:
      return value
    result, lora, inputs = np.empty(value.shape, self.dtype(path)), self.config.model.llm.lora, inputs_axis(path)
    for layer, matrix in enumerate(value):  # float32 for one layer at a time
      matrix = matrix.astype(np.float32)
      for of_layer in scale:
        matrix *= np.expand_dims(of_layer[layer], inputs)
      if factors:
        added = lora.alpha / lora.rank * (factors[0][layer] @ factors[1][layer])
        matrix += added if inputs == -2 else added.T
      result[layer] = matrix
    return result

  def _stored(self, path: str, layers: slice) -> np.ndarray:
    """Of a parameter what these layers have, read by itself, which Orbax' own way of reading cannot do."""
    trained = self.plan.stage.trains(path)
    info = ocp.type_handlers.ParamInfo(name=path, parent_dir=self._directory_of[trained], ts_context=self._context,
                                       use_zarr3=self._described[trained].use_zarr3)
    specification = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
    array = tensorstore.open(specification, context=self._context).result()
    return np.asarray((array[layers] if array.rank else array).read().result())

  def _scale_of(self, path: str) -> list[str]:
    """The scale of an int8 kernel; none of others."""
    return [path + SCALE] if path + SCALE in self.plan.shapes else []

  def _lora_of(self, path: str) -> list[str]:
    """The two factors that are added to this parameter; none to most."""
    module, _, leaf = path.rpartition("/")
    factors = [f"{module}/lora_a", f"{module}/lora_b"]
    return factors if leaf in ("kernel", "weight") and factors[0] in self.plan.shapes else []


def _describe(directory: epath.Path):
  """What Orbax knows of the arrays in a directory, by path, and of their format."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.metadata(directory).item_metadata
