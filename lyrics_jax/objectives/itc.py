"""Image-text contrast (paper section 3.2)."""

import dataclasses

import jax
import jax.numpy as jnp

from lyrics_jax.models.aligner import AlignerSettings, AlignmentPasses
from lyrics_jax.objectives.base import Array, Objective, Term
from refiner_export.common.checks import below_one
from refiner_export.common.settings import require


@dataclasses.dataclass(unsafe_hash=True)
class ITC(Objective):
  """L_itc = 1/2 (CE(s(I, T), y) + CE(s(T, I), y)), y the diagonal, over the global batch.

  s is `Aligner.similarity`. A picture that stands in several rows is no negative of itself: all its texts are right for
  it, and y shares the probability among them, as BLIP does.

  Under `jit` the similarity matrix is of the whole global batch on any mesh. Only the texts' [B, W] features travel
  between devices.
  """
  name = "itc"
  model = AlignerSettings
  reads = ("picture_id", "spatial_ids", "spatial_mask", "caption_ids", "caption_mask")
  label_smoothing: float = 0.1

  def __call__(self, passes: AlignmentPasses) -> Term:
    return Term(contrastive_loss(passes.similarity, self.label_smoothing, same_picture(passes.batch)),
                metrics={"temperature": passes.model.temperature[...]})

  def check_rows(self, rows: int, path: str) -> None:
    require(rows >= 2, f"{path}={rows}: contrastive learning needs at least 2 pairs per microbatch")

  def check(self, path: str) -> None:
    super().check(path)
    below_one(self, path, "label_smoothing")


def same_picture(batch: dict[str, Array]) -> Array:
  """bool[B, B]: whether two rows of a batch of pairs have the same picture."""
  identity = batch["picture_id"][:, 0]
  return identity[:, None] == identity[None]


def contrastive_loss(similarity: Array, smoothing: float, same: Array | None = None) -> Array:
  """The mean of both directions' cross-entropy.

  Args:
    similarity: float32[B, B], row i belongs to column i.
    smoothing: share of the probability that is spread over all columns.
    same: bool[B, B], symmetric, True where a row and a column belong together; None for the diagonal.
  """
  same = jnp.eye(len(similarity), dtype=bool) if same is None else same
  targets = same / same.sum(1, keepdims=True)
  targets = (1 - smoothing) * targets + smoothing / len(similarity)
  of_images = -(targets * jax.nn.log_softmax(similarity)).sum(1).mean()
  of_texts = -(targets * jax.nn.log_softmax(similarity.T)).sum(1).mean()
  return (of_images + of_texts) / 2
