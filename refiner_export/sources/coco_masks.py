"""COCO's masks: polygons and run-length codes. Each is checked before pycocotools gets it.

pycocotools trusts what it is given: it reads memory that is not its own for a code of another size, and it takes a
polygon of two points for a box.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from refiner_export.common.images import LARGEST_PICTURE
from refiner_export.records.masks import decode_rle

NO_MASK = "mask cannot be used: its box stands for it"

_LEAST = 6  # numbers of a polygon: three points
_LONGEST = 10**7  # pixels of all outlines of a mask together: pycocotools takes 40 bytes for each


def mask_of(segmentation: object, height: int, width: int) -> Callable[[], np.ndarray] | None:
  """A function that returns bool (height, width), for polygons or a run-length code, plain or compressed.

  Raises:
    ValueError: no mask of this size follows from the segmentation, or the mask is empty.
  """
  if not segmentation:
    return None
  if height * width > LARGEST_PICTURE:
    raise ValueError("too large")
  if isinstance(segmentation, dict):
    return functools.partial(_repeat, _runs(segmentation, height, width), height, width)
  return functools.partial(_fill, _polygons(segmentation, height, width), height, width)


def version_of(segmentation: object) -> str:
  """A text that changes with the mask."""
  if not segmentation:
    return ""
  return hashlib.sha256(json.dumps(segmentation, sort_keys=True).encode()).hexdigest()[:12]


def _runs(code: dict, height: int, width: int) -> list[int]:
  """The lengths of runs of zeros and ones in turn, along the columns."""
  counts = code.get("counts")
  if code.get("size", [height, width]) != [height, width]:
    raise ValueError("of another size")
  if isinstance(counts, str):
    mask = decode_rle(counts.encode(), height, width)
    edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
    counts = np.diff([0, *edges.tolist(), mask.size]).tolist()
  if not isinstance(counts, list) or not _are_counts(counts) or sum(counts) != height * width:
    raise ValueError("not run lengths")
  if not any(counts[1::2]):
    raise ValueError("empty")
  return counts


def _are_counts(counts: list) -> bool:
  for count in counts:
    if type(count) is not int or count < 0:
      return False
  return True


def _repeat(runs: Sequence[int], height: int, width: int) -> np.ndarray:
  return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _polygons(segmentation: object, height: int, width: int) -> list[list[float]]:
  """The polygons that have an area. Points may lie outside of the picture, but not far: the outline is walked."""
  if not isinstance(segmentation, list):
    raise ValueError("neither polygons nor a run-length code")
  limit, length, kept = 2 * max(height, width), 0.0, []
  for polygon in segmentation:
    if not isinstance(polygon, list) or len(polygon) % 2 or not _are_numbers(polygon, limit):
      raise ValueError("not a polygon")
    points = np.array(polygon, np.float64).reshape(-1, 2)
    length += _length(points)
    if len(polygon) >= _LEAST and not _is_flat(points) and _is_seen(points, height, width):
      kept.append(polygon)
  if not kept or length > _LONGEST:
    raise ValueError("empty, or endless")
  return kept


def _are_numbers(values: list, limit: float) -> bool:
  for value in values:
    if type(value) not in (int, float) or not -limit <= value <= limit:  # also false for what is not a number
      return False
  return True


def _length(points: np.ndarray) -> float:
  return float(np.abs(np.diff(points, axis=0)).sum() + np.abs(points[:1] - points[-1:]).sum())


def _is_flat(points: np.ndarray) -> bool:
  """Whether all points lie on one line."""
  x, y = (points - points[0]).T
  far = np.argmax(np.abs(x) + np.abs(y))
  return not (x * y[far] != y * x[far]).any()


def _is_seen(points: np.ndarray, height: int, width: int) -> bool:
  """Whether the polygon reaches into the picture."""
  return bool((points.max(axis=0) > 0).all() and (points.min(axis=0) < (width, height)).all())


def _fill(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
  from pycocotools import mask as coco_mask  # only this source needs it
  return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)
