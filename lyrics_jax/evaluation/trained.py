"""A run's newest checkpoint as a model that computes, on this process's first device."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from lyrics_jax.config import MeshConfig
from lyrics_jax.stages import make_stage
from lyrics_jax.stages.base import Batch
from lyrics_jax.training.checkpoint import open_run
from lyrics_jax.training.parameters import ParameterPlan
from lyrics_jax.training.sharding import global_batch, make_mesh
from refiner_export.common.settings import require


class TrainedModel:
  """`config`, `stage`, `plan` and `mesh` of a run, and `parameters`: its (trained, frozen) ones.

  Args:
    output: the run's output directory.
    stage: the only stage that will do; empty takes either.

  Raises:
    UserError: no such run, or a run of the other stage.
  """

  def __init__(self, output: str, stage: str = ""):
    checkpoints, self.config = open_run(output)
    require(stage in ("", self.config.stage),
            f"{output} is a run of stage {self.config.stage}, this needs one of stage {stage}: name its output directory")
    self.stage = make_stage(self.config)
    self.plan = ParameterPlan.of(self.stage)
    self.mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])
    shardings = self.plan.shardings(self.mesh)
    trained, frozen = self.plan.split({path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[path])
                                       for path, shape in self.plan.shapes.items()})
    self.parameters = checkpoints.restore_parameters(trained), checkpoints.restore_frozen(frozen)
    checkpoints.close()

  def compiled(self, function: Callable[[nnx.Module, Batch], object]) -> Callable[[dict[str, np.ndarray]], object]:
    """`function(model, batch)` as a compiled function of a batch in NumPy arrays."""
    jitted = jax.jit(lambda parameters, batch: function(self.plan.model(*parameters), batch))

    def run(batch: dict[str, np.ndarray]):
      with jax.set_mesh(self.mesh):
        return jitted(self.parameters, global_batch(self.mesh, batch))

    return run
