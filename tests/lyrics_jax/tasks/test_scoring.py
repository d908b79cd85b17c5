"""Scores against counting by hand."""

import numpy as np
import pytest

from lyrics_jax.tasks import scoring
from refiner_export.common.boxes import iou


def test_iou_counts_pixels():
  rng = np.random.default_rng(0)
  corners = np.sort(rng.integers(0, 21, (2, 300, 2, 2)), axis=2)  # boxes without area are among them
  a, b = corners.reshape(2, 300, 4)

  def painted(box):
    canvas = np.zeros((20, 20), bool)
    canvas[box[1]:box[3], box[0]:box[2]] = True
    return canvas

  expected = []
  for first, second in zip(a, b):
    first, second = painted(first), painted(second)
    expected.append((first & second).sum() / max((first | second).sum(), 1))
  assert 0 in expected and max(expected) > 0.5
  np.testing.assert_allclose(iou(a / 20, b / 20), expected, atol=1e-12)
  np.testing.assert_allclose(iou(b / 20, a / 20), expected, atol=1e-12)


def test_iou_of_equal_wrong_and_no_boxes():
  box = np.array([[0.1, 0.2, 0.5, 0.9]], np.float32)
  assert iou(box, box) == pytest.approx([1])
  assert iou(box, box[:, [2, 3, 0, 1]]) == [0]  # corners in the wrong order
  assert iou(box[:, [2, 3, 0, 1]], box[:, [2, 3, 0, 1]]) == [0]
  assert iou(np.zeros((1, 4)), np.zeros((1, 4))) == [0]
  assert iou(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)


def test_exact():
  assert scoring.exact(" two \n", "two") == 1
  assert scoring.exact("Two", "two") == scoring.exact("two cats", "two") == scoring.exact("", "two") == 0


def test_summaries():
  assert scoring.summarise_texts([1, 0, 0, 1]) == {"count": 4, "exact": 0.5}
  assert scoring.summarise_boxes([0.5, 0.25, 1, 0.25]) == {"count": 4, "mean_iou": 0.5, "found": 0.5}
  assert scoring.mean([0.1] * 10) == 0.1 and scoring.mean([]) is None
  assert scoring.summarise_texts([]) == {"count": 0, "exact": None}
  assert scoring.summarise_boxes([]) == {"count": 0, "mean_iou": None, "found": None}
