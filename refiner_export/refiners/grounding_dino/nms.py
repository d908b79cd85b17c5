"""Non-maximum suppression in plain torch."""

import torch


def classwise_nms(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, max_iou: float,
) -> torch.Tensor:
  """Keeps a box unless a better one of its class, itself kept, overlaps it by more than `max_iou`.

  Args:
    boxes: (K, 4) xyxy.
    scores: (K,); of equal scores the earlier box is the better one.
    classes: (K,) integers.
    max_iou: intersection over union above which a box is the same object.

  Returns:
    int64 positions of the boxes kept, in descending score.
  """
  order = scores.argsort(descending=True, stable=True)
  boxes, classes = boxes[order], classes[order]
  rivals = (_iou(boxes) > max_iou) & (classes[:, None] == classes)
  kept = torch.ones_like(order, dtype=torch.bool)
  for rank in range(len(order)):
    if kept[rank]:
      kept[rank + 1:] &= ~rivals[rank, rank + 1:]
  return order[kept]


def _iou(boxes: torch.Tensor) -> torch.Tensor:
  """(K, K): the intersection over union of each pair."""
  low = torch.maximum(boxes[:, None, :2], boxes[:, :2])
  high = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
  shared = (high - low).clamp(min=0).prod(dim=-1)
  areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)
  # Two boxes without area share none of it; they must not divide by zero.
  return shared / (areas[:, None] + areas - shared).clamp(min=torch.finfo(boxes.dtype).tiny)
