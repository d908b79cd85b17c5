"""Figures that tasks share: exact match of texts, and summaries of scores. `common.boxes.iou` compares boxes."""

import math
from collections.abc import Sequence

RIGHT_IOU = 0.5  # from which on a box counts as found, the usual threshold of referring expressions


def exact(prediction: str, answer: str) -> float:
  """1.0 when the texts are equal but for white space around them, else 0.0."""
  return float(prediction.strip() == answer.strip())


def summarise_texts(scores: Sequence[float]) -> dict[str, float | int | None]:
  """`count`, and `exact`: the share of texts that are exactly right, None for no texts."""
  return {"count": len(scores), "exact": mean(scores)}


def summarise_boxes(scores: Sequence[float]) -> dict[str, float | int | None]:
  """`count`, `mean_iou`, and `found`: the share with an IoU of at least `RIGHT_IOU`; None for no boxes."""
  found = sum(score >= RIGHT_IOU for score in scores)
  return {"count": len(scores), "mean_iou": mean(scores), "found": found / len(scores) if scores else None}


def mean(values: Sequence[float]) -> float | None:
  """The mean, exact to the last bit; None for no values."""
  return math.fsum(values) / len(values) if values else None
