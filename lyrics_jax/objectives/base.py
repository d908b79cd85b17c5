"""What every objective offers: the fields it reads, the fields it adds to a batch, and a loss."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lyrics_jax.data.batch import Field
from lyrics_jax.models.base import ModelSettings
from refiner_export.common.settings import Settings, require

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Term:
  """One objective's part of the loss.

  `value`: float32[]; `count`: float32[], over how many targets it is a mean (1 where that has no meaning); `metrics`:
  more numbers for a person, by name.
  """
  value: Array
  count: Array = dataclasses.field(default_factory=lambda: jnp.float32(1))
  metrics: dict[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(unsafe_hash=True)
class Objective(Settings):
  """Settings of a term, and the term itself. `weight` is its factor in the stage's loss.

  Attributes:
    name: of its metric and of its random stream.
    model: the kind of model whose outputs it reads.
    reads: fields of a batch that it needs, those it adds included.
    adds: fields that no other part makes, see `prepare`.
  """
  name: ClassVar[str]
  model: ClassVar[type[ModelSettings]] = ModelSettings
  reads: ClassVar[tuple[str, ...]] = ()
  adds: ClassVar[dict[str, Field]] = {}
  weight: float = 1.0

  def __call__(self, passes: Any) -> Term:
    """The term on one batch; `passes` is what `model.passes(batch, key)` gives, shared by all objectives."""
    raise NotImplementedError

  def prepare(self, pair: Any, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """On the host: the fields of `adds` for one example, from an encoded pair (`data.pairs.EncodedPair`)."""
    return {}

  def check_rows(self, rows: int, path: str) -> None:
    """Raises `UserError` for a microbatch of so many rows that the objective cannot use."""

  def check(self, path: str) -> None:
    require(self.weight > 0, f"{path}.weight={self.weight} must be positive; leave the objective out instead")


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> Array:
  """Per-position cross-entropy in float32, logits [..., V] and int targets [...].

  With label smoothing s the target distribution is (1 - s) on the target plus s / V on every class.
  """
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
  loss = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
  return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * log_probabilities.mean(-1)


def masked_mean(values: Array, mask: Array) -> Array:
  """Mean of `values` where `mask` is True; zero when it is nowhere."""
  return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)
