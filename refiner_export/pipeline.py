"""From examples to records: read, turn upright, shrink, tag, detect, segment. Writes nothing."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from refiner_export import images
from refiner_export.config import ImageSettings
from refiner_export.record import Record
from refiner_export.refiners.base import Picture, Refiner
from refiner_export.sources.base import SourceExample


def refine(
    examples: Sequence[SourceExample], refiner: Refiner, image: ImageSettings, source: str,
) -> list[Record | images.UnreadableImage]:
  """One result per example, in order: its record, or why its picture cannot be read."""
  opened = [_open(example, image.max_side) for example in examples]
  pictures = [Picture(found, example.objects)
              for found, example in zip(opened, examples) if isinstance(found, Image.Image)]
  tags = refiner.tagger.tag(pictures)
  detections = refiner.detector.detect(pictures, tags)
  refined = zip(detections, refiner.segmenter.segment(pictures, detections))
  results = []
  for example, found in zip(examples, opened):
    if not isinstance(found, Image.Image):
      results.append(found)
      continue
    detected, segments = next(refined)
    results.append(Record(
        id=example.id, source=source,
        image=images.to_jpeg(found, image.quality), height=found.height, width=found.width,
        captions=example.captions, conversations=example.conversations,
        text_boxes=np.array(example.text_boxes, np.float32).reshape(-1, 4),
        tags=detected.tags, boxes=detected.boxes, scores=detected.scores,
        detection_features=detected.row_features, detection_boxes=detected.row_boxes, mask_features=segments.features))
  return results


def refine_photo(data: bytes, refiner: Refiner, image: ImageSettings = ImageSettings()) -> Record:
  """The record of one photo that nobody annotated, from the bytes of its file. Raises `UnreadableImage`."""
  (result,) = refine([SourceExample("photo", lambda: data)], refiner, image, "photo")
  if isinstance(result, images.UnreadableImage):
    raise result
  return result


def _open(example: SourceExample, max_side: int) -> Image.Image | images.UnreadableImage:
  try:
    data = example.read_image()
  except OSError as error:  # one missing file must not end an export of a million
    return images.UnreadableImage(example.id, f"cannot be read: {error.strerror or error}: {error.filename}")
  try:
    return images.resize_to(images.open_upright(data, example.id), max_side)
  except images.UnreadableImage as error:
    return error
