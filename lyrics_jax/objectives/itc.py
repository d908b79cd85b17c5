"""Image-text contrast (paper section 3.2)."""

import dataclasses

import jax.numpy as jnp

from lyrics_jax.models.aligner import AlignerSettings, AlignmentPasses
from lyrics_jax.objectives.base import Array, Objective, Term, cross_entropy
from refiner_export.common.checks import below_one
from refiner_export.common.settings import require


@dataclasses.dataclass(unsafe_hash=True)
class ITC(Objective):
  """L_itc = 1/2 (CE(s(I, T), y) + CE(s(T, I), y)), y the diagonal, over the global batch.

  s is `Aligner.similarity`. Under `jit` the similarity matrix is of the whole global batch on any mesh; only the texts'
  [B, W] features travel between devices.
  """
  name = "itc"
  model = AlignerSettings
  reads = ("spatial_ids", "spatial_mask", "caption_ids", "caption_mask")
  label_smoothing: float = 0.1

  def __call__(self, passes: AlignmentPasses) -> Term:
    return Term(contrastive_loss(passes.similarity, self.label_smoothing),
                metrics={"temperature": passes.model.temperature[...]})

  def check_rows(self, rows: int, path: str) -> None:
    require(rows >= 2, f"{path}={rows}: contrastive learning needs at least 2 pairs per microbatch")

  def check(self, path: str) -> None:
    super().check(path)
    below_one(self, path, "label_smoothing")


def contrastive_loss(similarity: Array, smoothing: float) -> Array:
  """The mean of both directions' cross-entropy; similarity: [B, B], row i belongs to column i."""
  targets = jnp.arange(similarity.shape[0])
  of_images = cross_entropy(similarity, targets, smoothing).mean()
  of_texts = cross_entropy(similarity.T, targets, smoothing).mean()
  return (of_images + of_texts) / 2
