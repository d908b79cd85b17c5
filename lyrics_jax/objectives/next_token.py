"""Next-token prediction: the loss of instruction tuning (paper section 3.3)."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lyrics_jax.models.vlm import ConversationPasses, VLMSettings
from lyrics_jax.objectives.base import Array, Objective, Term
from refiner_export.common.checks import at_least


@dataclasses.dataclass(unsafe_hash=True)
class NextToken(Objective):
  """L = -E sum over the answers' tokens of log p(w_t | w_<t, pictures).

  Attributes:
    chunk: tokens of each row whose logits are in memory at a time.
  """
  name = "lm"
  model = VLMSettings
  reads = ("ids", "segments", "targets")
  chunk: int = 256

  def __call__(self, passes: ConversationPasses) -> Term:
    ids, targets = passes.batch["ids"], passes.batch["targets"]
    loss, accuracy = next_token_loss(passes.model.logits, passes.hidden, ids, targets, self.chunk)
    metrics = {"token_accuracy": accuracy, "soft_token_spread": passes.soft_token_spread()}
    return Term(loss, targets[:, 1:].sum().astype(jnp.float32), metrics)

  def check(self, path: str) -> None:
    super().check(path)
    at_least(self, path, 1, "chunk")


def next_token_loss(logits: Callable[[Array], Array], hidden: Array, ids: Array, targets: Array,
                    chunk: int) -> tuple[Array, Array]:
  """Mean cross-entropy of the next token, and the share of tokens that are the most probable one; zero without targets.

  The logits of a large vocabulary are the largest array of a step. Only those of `chunk` tokens of each row exist at a
  time, and the backward pass computes them again. Rows are not cut, so they stay where the mesh has them. A vocabulary
  that is split over devices stays split: only sums and maxima over it travel.

  Args:
    logits: [B, t, D] -> float32[B, t, V].
    hidden: [B, T, D]; place t predicts token t + 1.
    ids: int32[B, T]; targets: bool[B, T], True at the tokens whose prediction counts.
  """
  batch, length = ids.shape
  inputs = hidden, _following(ids), _following(targets)
  count = math.ceil(length / chunk)
  width = math.ceil(length / count)

  def sums(hidden: Array, target: Array, used: Array) -> tuple[Array, Array]:
    scores = logits(hidden)
    of_target = jnp.where(jnp.arange(scores.shape[-1]) == target[..., None], scores, 0).sum(-1)
    loss = jax.nn.logsumexp(scores, axis=-1) - of_target
    right = jax.lax.stop_gradient(scores).max(-1) == of_target
    return jnp.where(used, loss, 0).sum(), (used & right).sum(dtype=jnp.float32)

  def add(total, part):
    return jax.tree.map(jnp.add, total, jax.checkpoint(sums, prevent_cse=False)(*part)), None

  def chunks(x: Array) -> Array:
    x = jnp.pad(x, [(0, 0), (0, count * width - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, count, width, *x.shape[2:]).swapaxes(0, 1)

  if count == 1:
    loss, right = sums(*inputs)
  else:
    nothing = jnp.float32(0), jnp.float32(0)
    (loss, right), _ = jax.lax.scan(add, nothing, jax.tree.map(chunks, inputs))
  weight = jnp.maximum(inputs[2].sum(), 1)
  return loss / weight, right / weight


def _following(x: Array) -> Array:
  """[B, T] shifted by one: nothing follows the last token, and that place never counts."""
  return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
