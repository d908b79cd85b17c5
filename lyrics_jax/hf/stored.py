"""A run's newest checkpoint, a few parameters at a time, without building the model."""

import math
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lyrics_jax.models.quantised import SCALE
from lyrics_jax.stages import make_stage
from lyrics_jax.training.checkpoint import open_run, trained_manifest
from lyrics_jax.training.parameters import ParameterPlan
from refiner_export.manifest import MANIFEST

READ_BYTES = 2**30  # of parameters that are read together; a larger one is read alone


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

  def read(self, paths: Iterable[str], merged: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters in order, as stored; kernels in int8 are written out in bfloat16.

    With `merged`, LoRA is added to its kernels: W + alpha / r A B in float32, rounded to W's dtype.
    """
    for group in self._groups(paths):
      values = self._restore(group)
      scales = self._restore([scale for path in group for scale in self._scale_of(path)])
      lora = self._restore([factor for path in group for factor in self._lora_of(path)] if merged else [])
      for path in group:
        factors = [lora[factor] for factor in self._lora_of(path)] if merged else []
        yield path, self._finish(values.pop(path), [scales[scale] for scale in self._scale_of(path)], factors)

  def _groups(self, paths: Iterable[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for path in paths:
      shape = self.plan.shapes[path]
      more = math.prod(shape.shape) * shape.dtype.itemsize
      if group and size + more > READ_BYTES:
        yield group
        group, size = [], 0
      group.append(path)
      size += more
    yield group

  def _scale_of(self, path: str) -> list[str]:
    """The scale of an int8 kernel; none of others."""
    return [path + SCALE] if path + SCALE in self.plan.shapes else []

  def _lora_of(self, path: str) -> list[str]:
    """The two factors that are added to this parameter; none to most."""
    module, _, leaf = path.rpartition("/")
    factors = [f"{module}/lora_a", f"{module}/lora_b"]
    return factors if leaf == "kernel" and factors[0] in self.plan.shapes else []

  def _finish(self, value: np.ndarray, scale: list[np.ndarray], factors: list[np.ndarray]) -> np.ndarray:
    """A kernel [L, n, m] without int8 and with LoRA, where it has a scale [L, m] and factors [L, n, r], [L, r, m]."""
    if not scale and not factors:
      return value
    result, lora = np.empty(value.shape, ml_dtypes.bfloat16 if scale else value.dtype), self.config.model.llm.lora
    for layer, kernel in enumerate(value):  # float32 for one layer at a time
      kernel = kernel.astype(np.float32)
      for of_layer in scale:
        kernel *= of_layer[layer][None]
      if factors:
        kernel += lora.alpha / lora.rank * (factors[0][layer] @ factors[1][layer])
      result[layer] = kernel
    return result

  def _restore(self, paths: list[str]) -> dict[str, np.ndarray]:
    values = {}
    for trained, directory in self._directory_of.items():
      here = [path for path in paths if self.plan.stage.trains(path) == trained]
      if here:
        with ocp.PyTreeCheckpointer() as checkpointer:
          values |= checkpointer.restore(directory, args=ocp.args.PyTreeRestore(
              dict.fromkeys(here, 0), restore_args=dict.fromkeys(here, ocp.RestoreArgs(restore_type=np.ndarray)),
              partial_restore=True))
    return values
