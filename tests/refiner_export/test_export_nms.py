"""Class-wise non-maximum suppression is compared with a slow loop that follows the definition."""

import pytest
import torch

from refiner_export.refiners.grounding_dino.detector import classwise_nms


def iou(a, b):
  width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
  shared = max(width, 0) * max(height, 0)
  areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
  return shared / (sum(areas) - shared)


def brute_force(boxes, scores, classes, max_iou):
  left, kept = sorted(range(len(boxes)), key=lambda k: -scores[k]), []
  while left:
    best = left.pop(0)
    kept.append(best)
    left = [k for k in left if classes[k] != classes[best] or iou(boxes[k], boxes[best]) <= max_iou]
  return kept


@pytest.mark.parametrize("max_iou", [0.0, 0.3, 0.6, 1.0])
def test_it_is_what_the_loop_says(max_iou):
  generator = torch.Generator().manual_seed(0)
  low, size = torch.rand(80, 2, generator=generator), 0.1 + torch.rand(80, 2, generator=generator)
  boxes, scores = torch.cat([low, low + size], dim=1), torch.rand(80, generator=generator)
  scores[10:20] = scores[0]  # equal scores keep their order
  classes = torch.randint(3, (80,), generator=generator)
  kept = classwise_nms(boxes, scores, classes, max_iou).tolist()
  assert kept == brute_force(boxes.tolist(), scores.tolist(), classes.tolist(), max_iou)
  assert len(kept) < 80 or max_iou == 1.0


def test_a_dropped_box_drops_no_other():
  chain = torch.tensor([[0.0, 0, 1, 1], [0.3, 0, 1.3, 1], [0.6, 0, 1.6, 1]])  # neighbours overlap by 0.54
  assert classwise_nms(chain, torch.tensor([3.0, 2, 1]), torch.zeros(3), 0.5).tolist() == [0, 2]


def test_nothing_and_boxes_without_area():
  assert classwise_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 0.5).tolist() == []
  assert classwise_nms(torch.zeros(2, 4), torch.ones(2), torch.zeros(2), 0.5).tolist() == [0, 1]
