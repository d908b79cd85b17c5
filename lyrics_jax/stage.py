"""A stage of training as a value: a model, the objectives over it, and which of its parameters train."""

import dataclasses
import fnmatch
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.data.batch import Field
from lyrics_jax.models.base import ModelSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.objectives.base import Array, Objective
from refiner_export.common.settings import Settings, require

_BLOCKS = ("vision", "llm")  # the parts that consist of a stack of blocks, and can be stored in int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Loss:
  """A loss of one microbatch. Microbatches are averaged with their `weight`, the count of the first objective."""
  value: Array
  weight: Array
  metrics: dict[str, Array]


@dataclasses.dataclass(unsafe_hash=True)
class Stage(Settings):
  """What is trained, on which loss.

  Attributes:
    model: the model.
    objectives: the terms of the loss; it is their sum, each times its weight.
    train: patterns over the paths of parameters, such as `connector/*` and `llm/*/lora_*`; `*` also matches slashes.
      Every other parameter is frozen.
  """
  model: ModelSettings
  objectives: tuple[Objective, ...]
  train: tuple[str, ...]

  def check(self, path: str) -> None:
    require(bool(self.objectives), f"{path}.objectives is empty: name at least one")
    require(bool(self.train), f"{path}.train is empty: name the parameters to train, such as 'connector/*'")
    names = set()
    for n, objective in enumerate(self.objectives):
      kind = type(objective)
      require(isinstance(self.model, kind.model), f"{path}.objectives[{n}]={kind.__name__} needs a model of "
                                                  f"{kind.model.__name__}, {path}.model is {type(self.model).__name__}")
      require(objective.name not in names, f"{path}.objectives[{n}]: {objective.name} stands there twice")
      names.add(objective.name)

  def trains(self, parameter: str) -> bool:
    """Whether the parameter with this path, e.g. `vision/patch/kernel`, is trained."""
    return any(fnmatch.fnmatchcase(parameter, pattern) for pattern in self.train)

  @property
  def reads(self) -> tuple[str, ...]:
    """The fields of a batch that the model and the objectives read."""
    names = list(self.model.reads)
    for objective in self.objectives:
      names += objective.reads
    return tuple(dict.fromkeys(names))

  @property
  def adds(self) -> Mapping[str, Field]:
    """The fields that the objectives add to the table of `data.batch`."""
    added = {}
    for objective in self.objectives:
      added |= objective.adds
    return added

  def build(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
    """The freshly initialised model; with `frozen_dtype=int8`, blocks that are frozen are stored in int8."""
    int8 = []
    if compute.frozen_dtype == "int8":
      for part in _BLOCKS:
        if not self.trains(f"{part}/stack/blocks/up/kernel"):
          int8.append(part)
    return self.model.build(compute, int8, rngs)

  def loss(self, model: nnx.Module, batch: dict[str, Array], key: Array | None = None) -> Loss:
    """The loss of a batch; without a key there is no dropout."""
    passes = model.passes(batch, key)
    value, weight, metrics = jnp.float32(0), None, {}
    for objective in self.objectives:
      term = objective(passes)
      value = value + objective.weight * term.value
      weight = term.count if weight is None else weight
      metrics |= {objective.name: term.value, **term.metrics}
    return Loss(value, weight, metrics)
