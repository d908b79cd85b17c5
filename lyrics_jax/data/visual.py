"""What the model sees of a record: the picture for the image encoder and the refiner's local tokens, under one view."""

import numpy as np

from lyrics_jax.config import ModelConfig
from lyrics_jax.data.images import View, decode, to_cxcywh
from lyrics_jax.data.padding import pad_rows
from refiner_export.records.record import Record
from refiner_export.common.settings import UserError, require


def visual_inputs(record: Record, view: View, model: ModelConfig) -> dict[str, np.ndarray]:
  """The visual arrays of an example; S = image size, N = detection rows, M = mask rows, W = feature width (256).

  Returns:
    image: uint8 (S, S, 3); black for a record of text alone.
    detection: float32 (N, W + 4), the detector's feature and its box, cxcywh in [0, 1] of the view.
    detection_mask: bool (N,), False for padding and for rows outside the view.
    masks: float32 (M, W + 4), the segmenter's feature and the object's box, likewise.
    masks_mask: bool (M,).
  All local tokens are blank when `model.use_refiner` is false (paper table 6).
  """
  refiner = model.refiner
  width = record.detection_features.shape[1]
  require(width == refiner.feature_width,
          f"features are {width} wide, config.model.refiner.feature_width={refiner.feature_width}: set it to {width}")
  detection_boxes, detection_seen = view.boxes_cxcywh(record.detection_boxes)
  object_boxes, objects_seen = view.boxes_xyxy(record.boxes)
  detection, detection_mask = pad_rows(
      np.concatenate([record.detection_features, detection_boxes], axis=1),
      detection_seen & model.use_refiner, refiner.detection_rows)
  masks, masks_mask = pad_rows(
      np.concatenate([record.mask_features, to_cxcywh(object_boxes)], axis=1),
      objects_seen & model.use_refiner, refiner.mask_rows)
  return {"image": _image(record, view, model.vision.image_size),
          "detection": detection, "detection_mask": detection_mask, "masks": masks, "masks_mask": masks_mask}


def objects_in_view(record: Record, view: View, model: ModelConfig) -> list[tuple[str, np.ndarray]]:
  """Tag and box (xyxy in [0, 1] of the view) of each visible object, best scores first; none without the refiner."""
  boxes, seen = view.boxes_xyxy(record.boxes)
  return [(tag, box) for tag, box, visible in zip(record.tags, boxes, seen) if visible and model.use_refiner]


def _image(record: Record, view: View, size: int) -> np.ndarray:
  if not record.image:
    return np.zeros((size, size, 3), np.uint8)
  try:
    return view.image(decode(record.image), size)
  except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
    raise UserError(f"its image cannot be decoded ({error}): export it again") from error
