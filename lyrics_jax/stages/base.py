"""The interface between a stage and everything that trains, plans or evaluates it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.config import Config

Array = jax.Array
Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Loss:
  """A loss of one microbatch. Microbatches are averaged with their `weight` (number of targets, or 1)."""
  value: Array
  weight: Array
  metrics: dict[str, Array]


class Stage(Protocol):
  config: Config

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    """The freshly initialised model."""

  def trains(self, path: str) -> bool:
    """Whether the parameter with this path, e.g. `perception/vision/patch/kernel`, is trained."""

  def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of one global batch."""

  def loss(self, model: nnx.Module, batch: Batch, key: Array | None) -> Loss:
    """The loss of a batch; without a key there is no dropout."""


def visual_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """The part of a batch that both stages read: pictures and local tokens."""
  batch, size, refiner = config.batch_size, config.model.vision.image_size, config.model.refiner
  width = refiner.feature_width + 4
  return {
      "image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
      "detection": jax.ShapeDtypeStruct((batch, refiner.detection_rows, width), jnp.float32),
      "detection_mask": jax.ShapeDtypeStruct((batch, refiner.detection_rows), jnp.bool_),
      "masks": jax.ShapeDtypeStruct((batch, refiner.mask_rows, width), jnp.float32),
      "masks_mask": jax.ShapeDtypeStruct((batch, refiner.mask_rows), jnp.bool_),
  }


def text_spec(batch: int, lengths: dict[str, tuple[int, jnp.dtype]]) -> dict[str, jax.ShapeDtypeStruct]:
  return {name: jax.ShapeDtypeStruct((batch, length), dtype) for name, (length, dtype) in lengths.items()}


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


def next_token_loss(logits: Callable[[Array], Array], hidden: Array, ids: Array, trained: Array,
                    chunk: int) -> tuple[Array, Array]:
  """Mean cross-entropy of the next token, and the share of tokens that are the most probable one; zero without any.

  The logits of a large vocabulary are the largest array of a step: only those of `chunk` tokens of each row exist at a
  time, and the backward pass computes them again. Rows are not cut, so that they stay where the mesh has them, and a
  vocabulary that is split over devices stays split: only sums and maxima over it travel.

  Args:
    logits: [B, t, D] -> float32[B, t, V].
    hidden: [B, T, D], of which place t says token t + 1.
    ids: int32[B, T]; trained: bool[B, T], True at the tokens whose prediction counts.
  """
  batch, length = ids.shape
  following = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # nothing follows the last token, and it never counts
  inputs = hidden, following(ids), following(trained)
  count = math.ceil(length / chunk)
  width = math.ceil(length / count)

  def sums(hidden: Array, target: Array, used: Array) -> tuple[Array, Array]:
    scores = logits(hidden)
    of_target = jnp.where(jnp.arange(scores.shape[-1]) == target[..., None], scores, 0).sum(-1)
    loss = jax.nn.logsumexp(scores, axis=-1) - of_target
    right = jax.lax.stop_gradient(scores).max(-1) == of_target
    return jnp.where(used, loss, 0).sum(), (used & right).sum(dtype=jnp.float32)

  def fold(x: Array) -> Array:
    x = jnp.pad(x, [(0, 0), (0, count * width - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, count, width, *x.shape[2:]).swapaxes(0, 1)

  if count == 1:
    loss, right = sums(*inputs)
  else:
    add = lambda total, part: (jax.tree.map(jnp.add, total, jax.checkpoint(sums, prevent_cse=False)(*part)), None)
    (loss, right), _ = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), jax.tree.map(fold, inputs))
  weight = jnp.maximum(inputs[2].sum(), 1)
  return loss / weight, right / weight
