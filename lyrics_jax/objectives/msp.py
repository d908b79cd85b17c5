"""Masked spatial prediction (paper section 3.2)."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lyrics_jax.data.batch import Field
from lyrics_jax.models.aligner import AlignerSettings, AlignmentPasses
from lyrics_jax.models.inputs import merge_pictures
from lyrics_jax.objectives.base import Objective, Term, cross_entropy, masked_mean
from refiner_export.common.checks import below_one
from refiner_export.common.settings import require

IGNORED = -1  # target of a token that is not predicted
_SPATIAL = ("rows", "pictures", "spatial")


@dataclasses.dataclass(unsafe_hash=True)
class MSP(Objective):
  """L_msp = -E sum over masked tokens of log p(s | the unmasked, V, G), starting from [MLM].

  Attributes:
    mask_probability: of masking a whole object, its tag and its box. A picture in which nothing is masked adds nothing
      to the loss.
    mask_at_least_one: whether one object is masked where the draw masks none. Pictures of few objects then have more
      than `mask_probability` of their objects masked.
  """
  name = "msp"
  model = AlignerSettings
  reads = ("spatial_mask", "msp_ids", "msp_targets")
  adds = {
      "msp_ids": Field(_SPATIAL, "int32", 0, "former_vocabulary", "text", "spatial_mask"),
      "msp_targets": Field(_SPATIAL, "int32", IGNORED, "former_vocabulary", "text", "spatial_mask")}
  label_smoothing: float = 0.1
  mask_probability: float = 0.15
  mask_at_least_one: bool = False

  def __call__(self, passes: AlignmentPasses) -> Term:
    spatial = merge_pictures(passes.batch["msp_ids"]), passes.spatial[1]
    targets = merge_pictures(passes.batch["msp_targets"])
    logits = passes.model.spatial_logits(passes.context, spatial, passes.key(self.name))
    loss = cross_entropy(logits, jnp.maximum(targets, 0), self.label_smoothing)
    return Term(masked_mean(loss, targets >= 0))

  def prepare(self, pair, tokenizer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The spatial representation with whole objects hidden.

    Returns:
      msp_ids: int32 (Ls,), `[MLM]` for `[BOS]` and `[MASK]` for the tokens to predict; msp_targets: int32 (Ls,), the
      original ids there, -1 elsewhere.
    """
    masked = mask_objects(pair.owners, self.mask_probability, self.mask_at_least_one, rng)
    ids = np.where(masked, np.int32(tokenizer.mask), pair.spatial_ids)
    ids[0] = tokenizer.mlm
    return {"msp_ids": ids, "msp_targets": np.where(masked, pair.spatial_ids, np.int32(IGNORED))}

  def check(self, path: str) -> None:
    super().check(path)
    below_one(self, path, "label_smoothing")
    require(0 <= self.mask_probability <= 1, f"{path}.mask_probability={self.mask_probability} must lie in [0, 1]")


def mask_objects(owners: np.ndarray, probability: float, at_least_one: bool, rng: np.random.Generator) -> np.ndarray:
  """bool (n,), True at the tokens to predict: the whole tag and box of each object drawn with `probability`.

  The markers stay visible: they tell the layout.

  Args:
    owners: int (n,), the number of the object that each token spells; negative outside objects.
    at_least_one: whether one object is drawn where the probability draws none.
  """
  count = int(owners.max()) + 1
  drawn = rng.random(count) < probability
  if at_least_one and count and not drawn.any():
    drawn[rng.integers(count)] = True
  return np.isin(owners, np.flatnonzero(drawn))
