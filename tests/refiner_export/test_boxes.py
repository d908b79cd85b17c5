"""Boxes: conversions undo each other, IoU by counting pixels, and what a clipped box keeps."""

import numpy as np
import pytest

from refiner_export.common import boxes

DRAW = np.random.default_rng(0)


def some(count: int) -> np.ndarray:
  return boxes.order_corners(DRAW.random((count, 4), np.float32))


def test_conversions_undo_each_other():
  given = some(20)
  there = boxes.to_cxcywh(given)
  assert there.dtype == np.float32 and (there[:, 2:] >= 0).all()
  np.testing.assert_allclose(boxes.to_xyxy(there), given, atol=1e-6)
  np.testing.assert_allclose(boxes.to_xyxy(np.array([[0.5, 0.25, 1, 0.5]])), [[0, 0, 1, 0.5]])
  assert boxes.to_xyxy(np.zeros((0, 4))).shape == boxes.to_cxcywh(np.zeros((0, 4))).shape == (0, 4)


def test_iou_by_counting_pixels():
  a, b = (np.rint(some(50) * 20).astype(int) for _ in range(2))
  expected = []
  for one, other in zip(a, b):
    masks = np.zeros((2, 20, 20), bool)
    for mask, (left, top, right, bottom) in zip(masks, (one, other)):
      mask[top:bottom, left:right] = True
    shared, joined = masks.all(axis=0).sum(), masks.any(axis=0).sum()
    expected.append(shared / joined if shared else 0)
  np.testing.assert_allclose(boxes.iou(a, b), expected)


def test_boxes_without_area_meet_nothing():
  flat, turned, whole = [0.5, 0, 0.5, 1], [1, 1, 0, 0], [0, 0, 1, 1]
  assert boxes.area(np.array([flat, turned, whole])).tolist() == [0, 0, 1]
  a, b = np.array([flat, turned, whole, flat]), np.array([whole, whole, whole, flat])
  assert boxes.iou(a, b).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("box, clipped, visible", [
    ([0.2, 0.2, 0.4, 0.4], [0.2, 0.2, 0.4, 0.4], True),
    ([-0.5, 0, 0.5, 1], [0, 0, 0.5, 1], True),
    ([-0.75, 0, 0.25, 1], [0, 0, 0.25, 1], False),  # a quarter of it remains
    ([-0.69, 0, 0.31, 1], [0, 0, 0.31, 1], True),
    ([2, 2, 3, 3], [1, 1, 1, 1], False),
    ([0.5, 0.2, 0.5, 0.4], [0.5, 0.2, 0.5, 0.4], True),  # without area, its centre inside
    ([1.5, 0.2, 1.5, 0.4], [1, 0.2, 1, 0.4], False)])
def test_clip(box, clipped, visible):
  found, seen = boxes.clip(np.array([box]))
  np.testing.assert_allclose(found, [clipped])
  assert seen.tolist() == [visible]


def test_normalise():
  found = boxes.normalise((-5, 10, 40, 90), 80, 60)
  assert found == (0, 10 / 60, 0.5, 1) and all(type(corner) is float for corner in found)


def test_order_corners():
  assert boxes.order_corners(np.array([[3, 1, 2, 4]])).tolist() == [[2, 1, 3, 4]]
