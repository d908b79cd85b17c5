"""What an aligner knows of unseen scenes: retrieval by captions alone, matching by both halves, hidden objects.

Every hidden object is one that `MSP` hides: its tag and its box. At least one object of each scene is hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lyrics_jax.data.loader import collate
from lyrics_jax.data.rows import Example
from lyrics_jax.evaluation.retriever import Retriever, retrieve
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.models.aligner import Aligner
from lyrics_jax.objectives.itm import hard_negatives, no_negatives
from lyrics_jax.objectives.msp import MSP
from refiner_export.records.reader import RecordDirectory

HALVES = ("visual", "grounding")
_TEXTS = ("spatial_ids", "spatial_mask", "caption_ids", "caption_mask")


def measure_align(loaded: LoadedModel, directory: RecordDirectory, batch_size: int) -> dict[str, float]:
  """Figures in [0, 1] by name; one that nothing can be measured of is left out.

    i2t_r1, t2i_r1: recall at 1 by ITC, of captions without the spatial representation.
    itm_visual, itm_grounding: the share of pairs and of hard negatives, equally weighted, that one half tells rightly.
    msp_tags, msp_tenths, msp_digits: hidden tags, first decimals and all digits that are predicted rightly.
  """
  found = retrieve(Retriever(loaded, batch_size), directory, rerank=0)
  figures = {}
  for direction in "i2t", "t2i":
    figures[f"{direction}_r1"] = found[f"captions_only_itc_{direction}_r1"]
  config = loaded.config
  objectives = []
  for objective in config.stage.objectives:
    hides = isinstance(objective, MSP)
    objectives.append(dataclasses.replace(objective, mask_at_least_one=True) if hides else objective)
  examples = config.data.rows.examples(config.data, config.fields, config.dimensions, objectives)
  tell = loaded.compiled(_tell)
  matched, hidden = _Matched(), _Hidden(examples.tokenizer)
  for start in range(0, len(directory) - batch_size + 1, batch_size):  # a negative needs a full batch to be hard
    rows = []
    for position in range(start, start + batch_size):
      rows.append(examples(directory[position], np.random.default_rng(position), augment=False))
    batch = _arrays(rows)
    told = jax.tree.map(np.asarray, tell(batch))
    matched.add(told)
    hidden.add(batch["msp_targets"][:, 0], told["spatial"])
  return figures | matched.figures() | hidden.figures()


def _arrays(rows: list[Example]) -> dict[str, np.ndarray]:
  batch = collate(rows)
  del batch["records"]
  return batch


def _tell(model: Aligner, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """What the model says of a batch; B pairs, each with a hard negative text.

  Returns:
    pairs, negatives: bool [2, B], whether each half takes a pair for a true one.
    named: bool [2, B], whether the spatial representation of the pair's and of the negative's text names an object.
    found: bool [B], whether there is a negative.
    spatial: int32 [B, Ls], the most probable token at each place of the spatial representation.
  """
  passes = model.passes(batch)
  _, texts, found = hard_negatives(passes.similarity, no_negatives(batch), jax.random.key(0))
  negative = dict(batch)
  for name in _TEXTS:
    negative[name] = batch[name][texts]
  pairs = model.match(passes.key_values, passes.text).argmax(-1) == 1
  negatives = model.match(passes.key_values, model.passes(negative).text).argmax(-1) == 1
  named = jnp.stack([batch["spatial_mask"], negative["spatial_mask"]]).sum((2, 3)) > 1
  spatial = model.spatial_logits(passes.context, (batch["msp_ids"][:, 0], passes.spatial[1]))
  return {"pairs": pairs, "negatives": negatives, "named": named, "found": found,
          "spatial": spatial.argmax(-1).astype(jnp.int32)}


class _Matched:
  """Counts what both halves tell rightly. The grounding half is not asked where the text names no object."""

  def __init__(self):
    self._right = np.zeros((2, 2))  # half; pairs, negatives
    self._asked = np.zeros((2, 2))

  def add(self, told: dict[str, np.ndarray]) -> None:
    for half in range(2):
      for which, right in enumerate((told["pairs"][half], ~told["negatives"][half])):
        asked = np.ones_like(told["found"]) if which == 0 else told["found"]
        asked = asked & told["named"][which] if half else asked
        self._right[half, which] += (right & asked).sum()
        self._asked[half, which] += asked.sum()

  def figures(self) -> dict[str, float]:
    figures = {}
    for half, name in enumerate(HALVES):
      if self._asked[half].all():
        figures[f"itm_{name}"] = float((self._right[half] / self._asked[half]).mean())
    return figures


class _Hidden:
  """Counts the hidden tokens that are predicted rightly, by their kind."""

  def __init__(self, tokenizer):
    self._point = tokenizer.encode(".")[0]
    self._digits = [tokenizer.encode(digit)[0] for digit in "0123456789"]
    self._marks = tokenizer.encode("(),.")
    self._right, self._asked = {}, {}

  def add(self, targets: np.ndarray, predicted: np.ndarray) -> None:
    """targets: int32 [B, Ls], -1 where nothing is hidden; predicted: int32 [B, Ls]."""
    digit = np.isin(targets, self._digits)
    after_point = np.zeros_like(digit)
    after_point[:, 1:] = targets[:, :-1] == self._point
    kinds = {"tags": (targets >= 0) & ~digit & ~np.isin(targets, self._marks), "tenths": digit & after_point,
             "digits": digit}
    for kind, asked in kinds.items():
      self._asked[kind] = self._asked.get(kind, 0) + int(asked.sum())
      self._right[kind] = self._right.get(kind, 0) + int((asked & (targets == predicted)).sum())

  def figures(self) -> dict[str, float]:
    figures = {}
    for kind, asked in self._asked.items():
      if asked:
        figures[f"msp_{kind}"] = self._right[kind] / asked
    return figures
