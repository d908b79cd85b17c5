"""The very step that `train` runs, compiled for a slice that is not there: nothing but shapes and shardings goes in."""

import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from lyrics_jax.config import Config
from lyrics_jax.planning.hlo import Module
from lyrics_jax.planning.topology import Target
from lyrics_jax.stages import make_stage
from lyrics_jax.training.optimizer import learning_rate, make_optimizer
from lyrics_jax.training.parameters import ParameterPlan
from lyrics_jax.training.sharding import BATCH, check_batch, make_mesh
from lyrics_jax.training.step import TrainState, make_train_step, state_sharding
from refiner_export.common.settings import UserError


class DoesNotFit(UserError):
  """A program that needs more HBM than a chip has; `used` and `capacity` in bytes."""

  def __init__(self, used: float, capacity: float):
    self.used, self.capacity = used, capacity
    super().__init__(f"the step needs {used / 2**30:.1f} GiB of HBM per chip, {(used - capacity) / 2**30:.1f} GiB more than the "
                     f"{capacity / 2**30:.1f} GiB that a program may use")


@dataclasses.dataclass(frozen=True)
class Layout:
  """A configuration on the mesh of a slice, before anything is compiled."""
  config: Config
  target: Target
  mesh: Mesh
  plan: ParameterPlan
  optimizer: optax.GradientTransformation

  @classmethod
  def of(cls, config: Config, target: Target, plan: ParameterPlan | None = None) -> "Layout":
    """`plan` saves time where another configuration's has the same parameters and nothing is compiled.

    Raises:
      UserError: a mesh that does not fit the slice, the batch or a parameter.
    """
    mesh = make_mesh(config.mesh, target.devices)
    check_batch(config.batch_size // config.optimizer.accumulate_steps, mesh)
    plan = plan or ParameterPlan.of(make_stage(config))
    plan.shardings(mesh)
    return cls(config, target, mesh, plan, make_optimizer(config.optimizer, config.steps, plan.axes))

  @functools.cached_property
  def arguments(self) -> tuple[TrainState, dict, dict, jax.ShapeDtypeStruct]:
    """Abstract (state, frozen parameters, batch, key) of `train_step`."""
    trained, frozen = ({path: self.plan.shapes[path] for path in self.plan.paths(part)} for part in (True, False))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(self.optimizer.init, trained))
    return state, frozen, self.plan.stage.batch_spec(), jax.eval_shape(lambda: jax.random.key(0))

  @functools.cached_property
  def resident(self) -> dict[str, int]:
    """Bytes per chip of what is there between two steps, by kind."""
    state, frozen, batch, _ = self.arguments
    sharding = state_sharding(self.plan, self.optimizer, self.mesh)
    shardings = self.plan.shardings(self.mesh)
    return {"parameters, frozen": _bytes(frozen, {path: shardings[path] for path in frozen}),
            "parameters, trained": _bytes(state.parameters, sharding.parameters),
            "optimizer": _bytes(state.optimizer, sharding.optimizer),
            "batch": _bytes(batch, {name: NamedSharding(self.mesh, BATCH) for name in batch})}

  @property
  def least_bytes(self) -> int:
    """Less than this the step cannot need: what is resident, the gradients, and what remat keeps of each layer of the LLM."""
    llm, rows = self.config.model.llm, self.config.batch_size // self.config.optimizer.accumulate_steps
    tokens = rows * self.config.data.llm_length / (self.mesh.shape["data"] * self.mesh.shape["fsdp"])
    kept = llm.layers * tokens * llm.width * 2 if self.config.stage == "instruct" else 0
    return int(sum(self.resident.values()) + self.resident["parameters, trained"] + kept)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled step. `hbm`: bytes per chip by kind. `seconds`: what compiling took."""
  layout: Layout
  module: Module
  hbm: dict[str, int]
  seconds: float


def compile_step(layout: Layout) -> Program:
  """Raises `DoesNotFit`."""
  start = time.monotonic()
  config = layout.config
  step = make_train_step(layout.plan, layout.optimizer, learning_rate(config.optimizer, config.steps), layout.mesh)
  with jax.set_mesh(layout.mesh):
    lowered = step.lower(*layout.arguments)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      raise _too_large(error) or error from None
  memory = compiled.memory_analysis()
  # What tiles pad belongs to nobody: the compiler's sum of the arguments says how much it is. Its peak is what it compares with
  # a chip's HBM; the sum of all that it lists is up to a third larger.
  hbm = layout.resident | {"padding of arguments": max(0, memory.argument_size_in_bytes - sum(layout.resident.values()))}
  hbm["code"] = memory.generated_code_size_in_bytes
  module, rest = Module.parse(compiled.as_text()), memory.peak_memory_in_bytes - sum(hbm.values())
  hbm["activations"] = min(rest, module.kept_by_loops())
  hbm["temporary"] = rest - hbm["activations"]
  return Program(layout, module, hbm, time.monotonic() - start)


def _too_large(error: Exception) -> DoesNotFit | None:
  """From either way in which the compiler puts it: `Used 45.3G of 15.75G hbm`, `... (45.3G) exceeds available HBM (15.75G)`."""
  size = r"([\d.]+)([KMGT])"
  found = re.search(rf"Used {size} of {size} hbm", str(error)) or re.search(rf"\({size}\) exceeds available HBM \({size}\)", str(error))
  unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  return DoesNotFit(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]) if found else None


def _bytes(arrays, shardings) -> int:
  return sum(jax.tree.leaves(jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, arrays, shardings)))
