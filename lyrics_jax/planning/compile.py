"""Compiles the step that `train` runs for a slice that is not there. Only shapes and shardings go in."""

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
from lyrics_jax.planning.hbm import kept_by_loops
from lyrics_jax.planning.hlo import Module
from lyrics_jax.planning.topology import Target
from lyrics_jax.sharding import BATCH, batch_shards, check_batch, make_mesh
from lyrics_jax.training.optimizer import learning_rate, make_optimizer
from lyrics_jax.training.parameters import ModelParameters
from lyrics_jax.training.step import TrainState, make_train_step, state_sharding
from refiner_export.common.settings import UserError

GIB = 2**30
CONVERSATION = "ids"  # the field of a batch that language models read


class DoesNotFit(UserError):
  """A program that needs more HBM than a chip has; `used` and `capacity` in bytes."""

  def __init__(self, used: float, capacity: float):
    self.used, self.capacity = used, capacity
    super().__init__(f"the step needs {used / GIB:.1f} GiB of HBM per chip, {(used - capacity) / GIB:.1f} GiB more "
                     f"than the {capacity / GIB:.1f} GiB that a program may use")


@dataclasses.dataclass(frozen=True)
class Layout:
  """A configuration on the mesh of a slice, before anything is compiled."""
  config: Config
  target: Target
  mesh: Mesh
  parameters: ModelParameters
  optimizer: optax.GradientTransformation

  @classmethod
  def of(cls, config: Config, target: Target, parameters: ModelParameters | None = None) -> "Layout":
    """Lays `config` out on the target.

    Args:
      parameters: those of another configuration with the same parameters, to save time where nothing is compiled.

    Raises:
      UserError: the mesh does not fit the slice, the batch or a parameter.
    """
    mesh = make_mesh(config.mesh, target.devices)
    check_batch(config.microbatch, mesh)
    parameters = parameters or ModelParameters.of(config)
    parameters.shardings(mesh)
    return cls(config, target, mesh, parameters, make_optimizer(config.optimizer, config.steps, parameters.axes))

  @functools.cached_property
  def arguments(self) -> tuple[TrainState, dict, dict, jax.ShapeDtypeStruct]:
    """Abstract (state, frozen parameters, batch, key) of `train_step`."""
    trained, frozen = self.parameters.split(self.parameters.memory)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(self.optimizer.init, trained))
    return state, frozen, self.config.batch_spec(), jax.eval_shape(jax.random.key, 0)

  @functools.cached_property
  def resident(self) -> dict[str, int]:
    """Bytes per chip of what is there between two steps, by kind."""
    state, frozen, batch, _ = self.arguments
    sharding = state_sharding(self.parameters, self.optimizer, self.mesh)
    _, frozen_shardings = self.parameters.split(self.parameters.shardings(self.mesh))
    return {"parameters, frozen": _bytes(frozen, frozen_shardings),
            "parameters, trained": _bytes(state.parameters, sharding.parameters),
            "optimizer": _bytes(state.optimizer, sharding.optimizer),
            "batch": _bytes(batch, dict.fromkeys(batch, NamedSharding(self.mesh, BATCH)))}

  @property
  def least_bytes(self) -> int:
    """A lower bound of the HBM that a step needs: what is resident, the gradients, and the inputs of the LLM's layers.

    Every remat policy keeps the inputs of the language model's layers. A model without one reads no conversations.
    """
    kept = 0
    if CONVERSATION in self.config.fields:
      llm, tokens = self.config.stage.model.llm, self.config.microbatch * self.config.dimensions.conversation
      kept = llm.layers * llm.width * 2 * tokens / batch_shards(self.mesh)
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
  schedule = learning_rate(config.optimizer, config.steps)
  step = make_train_step(layout.parameters, layout.optimizer, schedule, layout.mesh)
  with jax.set_mesh(layout.mesh):
    lowered = step.lower(*layout.arguments)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      raise _too_large(error) or error from None
  module = Module.parse(compiled.as_text())
  hbm = _memory(layout.resident, compiled.memory_analysis(), kept_by_loops(module))
  return Program(layout, module, hbm, time.monotonic() - start)


def _memory(resident: dict[str, int], analysis, kept: int) -> dict[str, int]:
  """Bytes per chip by kind; they add up to the compiler's peak, which the compiler compares with a chip's HBM.

  The sum of all that the compiler lists is up to a third larger than its peak.

  Args:
    resident: bytes of the step's arguments, by kind.
    analysis: the compiler's, of `jax.stages.Compiled.memory_analysis()`.
    kept: bytes that loops keep for later loops.
  """
  # The compiler's size of the arguments includes the padding of tiles, which belongs to no single argument.
  padding = max(0, analysis.argument_size_in_bytes - sum(resident.values()))
  hbm = resident | {"padding of arguments": padding, "code": analysis.generated_code_size_in_bytes}
  rest = analysis.peak_memory_in_bytes - sum(hbm.values())
  hbm["activations"] = min(rest, kept)
  hbm["temporary"] = rest - hbm["activations"]
  return hbm


def _too_large(error: Exception) -> DoesNotFit | None:
  """The compiler words it in two ways: `Used 45.3G of 15.75G hbm`, `... (45.3G) exceeds available HBM (15.75G)`."""
  size = r"([\d.]+)([KMGT])"
  found = (re.search(rf"Used {size} of {size} hbm", str(error))
           or re.search(rf"\({size}\) exceeds available HBM \({size}\)", str(error)))
  unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  return DoesNotFit(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]) if found else None


def _bytes(arrays, shardings) -> int:
  """Bytes per chip of a tree of abstract arrays with these shardings."""

  def of_one(array, sharding) -> int:
    return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(of_one, arrays, shardings)))
