"""Boxes as both packages compute with them: NumPy alone, one row per box.

A box is `xyxy`, its corners (left, top, right, bottom), or `cxcywh`, its centre and size. Functions take any
unit; boxes of records are in [0, 1] of a picture.
"""

from collections.abc import Sequence

import numpy as np

VISIBLE_SHARE = 0.3  # a box counts as visible when at least this share of its area is in the view


def to_xyxy(boxes: np.ndarray) -> np.ndarray:
  """(n, 4) cxcywh -> (n, 4) xyxy, of the same dtype."""
  return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def to_cxcywh(boxes: np.ndarray) -> np.ndarray:
  """(n, 4) xyxy -> (n, 4) cxcywh, of the same dtype."""
  return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def area(boxes: np.ndarray) -> np.ndarray:
  """(n, 4) xyxy -> (n,). A box with its corners in the wrong order has the area 0."""
  return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Intersection over union of row i of `a` with row i of `b`.

  Args:
    a, b: (n, 4) xyxy.

  Returns:
    float64 (n,). A box without area, or with its corners in the wrong order, has an IoU of 0 with every box.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  shared = area(np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], axis=1))
  joined = area(a) + area(b) - shared
  return np.divide(shared, joined, out=np.zeros_like(shared), where=shared > 0)


def clip(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Clips boxes to the unit square and says which boxes remain visible.

  Args:
    boxes: (n, 4) xyxy.

  Returns:
    (n, 4) xyxy in [0, 1]; bool (n,), True where at least `VISIBLE_SHARE` of the area remains. A box without area is
    visible when its centre is inside.
  """
  clipped = np.clip(boxes, 0, 1)
  whole, remaining = area(boxes), area(clipped)
  centre = (boxes[:, :2] + boxes[:, 2:]) / 2
  inside = ((centre >= 0) & (centre <= 1)).all(axis=1)
  return clipped, np.where(whole > 0, remaining >= VISIBLE_SHARE * whole, inside)


def normalise(box: Sequence[float], width: float, height: float) -> tuple[float, float, float, float]:
  """One xyxy box in pixels of a picture -> xyxy in [0, 1], clipped to the picture."""
  left, top, right, bottom = box
  corners = (left / width, top / height, right / width, bottom / height)
  return tuple(float(min(max(corner, 0.0), 1.0)) for corner in corners)


def order_corners(boxes: np.ndarray) -> np.ndarray:
  """(n, 4) xyxy with corners in any order -> (n, 4) xyxy with left <= right and top <= bottom."""
  return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
