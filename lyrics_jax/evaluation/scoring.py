"""Whether an answer is right: exact match of texts, intersection over union of boxes. Plain NumPy, no model."""

import math
from collections.abc import Sequence

import numpy as np

RIGHT_IOU = 0.5  # from which on a box counts as found, the usual threshold of referring expressions


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Intersection over union, float64 (n,), of boxes a and b, (n, 4) xyxy each, pair by pair.

  A box without area, or with its corners in the wrong order, meets nothing: 0.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  shared = _area(np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], axis=1))
  joined = _area(a) + _area(b) - shared
  return np.divide(shared, joined, out=np.zeros_like(shared), where=shared > 0)


def exact(prediction: str, answer: str) -> float:
  """1.0 when the texts are equal but for white space around them, else 0.0."""
  return float(prediction.strip() == answer.strip())


def summarise_texts(scores: Sequence[float]) -> dict[str, float | int | None]:
  """`count`, and `exact`: the share of texts that are exactly right; None of no texts."""
  return {"count": len(scores), "exact": _mean(scores)}


def summarise_boxes(scores: Sequence[float]) -> dict[str, float | int | None]:
  """`count`, `mean_iou` and `found`: the share with an IoU of at least `RIGHT_IOU`; None of no boxes."""
  return {"count": len(scores), "mean_iou": _mean(scores), "found": _mean([score >= RIGHT_IOU for score in scores])}


def _mean(values: Sequence[float]) -> float | None:
  return math.fsum(values) / len(values) if values else None


def _area(boxes: np.ndarray) -> np.ndarray:
  return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
