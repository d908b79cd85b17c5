"""Image-grounded caption generation (paper section 3.2)."""

import dataclasses

import numpy as np

from lyrics_jax.data.batch import Field
from lyrics_jax.models.aligner import AlignerSettings, AlignmentPasses
from lyrics_jax.objectives.base import Objective, Term, cross_entropy, masked_mean
from refiner_export.common.checks import below_one


@dataclasses.dataclass(unsafe_hash=True)
class ICG(Objective):
  """L_icg = -E sum_t log p(c_t | c_<t, V, G), starting from [DEC]."""
  name = "icg"
  model = AlignerSettings
  reads = ("caption_mask", "icg_ids")
  adds = {"icg_ids": Field(("rows", "caption"), "int32", 0, "former_vocabulary", "caption", "caption_mask")}
  label_smoothing: float = 0.1

  def __call__(self, passes: AlignmentPasses) -> Term:
    ids, mask = passes.batch["icg_ids"], passes.batch["caption_mask"]
    logits = passes.model.caption_logits(passes.context, (ids, mask), passes.key(self.name))
    loss = cross_entropy(logits[:, :-1], ids[:, 1:], self.label_smoothing)
    return Term(masked_mean(loss, mask[:, 1:]))

  def prepare(self, pair, tokenizer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """icg_ids: int32 (Lc,), the caption with `[DEC]` for `[CLS]`."""
    ids = pair.caption_ids.copy()
    ids[0] = tokenizer.dec
    return {"icg_ids": ids}

  def check(self, path: str) -> None:
    super().check(path)
    below_one(self, path, "label_smoothing")
