"""From examples to records: read, turn upright, shrink, tag, detect, segment. Writes nothing.

A window of pictures goes through one part of the refiner after the other. A network forms its own batches within the
window, of pictures that have the same size as it sees them: nothing is padded, so no picture's results depend on which
others are in the window, and the larger the window, the fuller the batches. `read` is what can be done ahead of the
networks, by threads.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from refiner_export.export import images
from refiner_export.export.config import ImageSettings
from refiner_export.records.record import Record
from refiner_export.refiners.base import Detections, Picture, Refiner, Segments
from refiner_export.sources.base import SourceExample


@dataclasses.dataclass(frozen=True)
class StoredPicture:
  """A picture at the size that is stored, which is also what the refiner sees, and its JPEG."""
  image: Image.Image
  jpeg: bytes


def read(example: SourceExample, image: ImageSettings) -> StoredPicture | images.UnreadableImage:
  """Reads, decodes, turns, shrinks and encodes the picture of an example, or says why it cannot be read."""
  try:
    data = example.read_image()
  except OSError as error:  # one missing file must not end an export of a million
    return images.UnreadableImage(example.id, f"cannot be read: {error.strerror or error}: {error.filename}")
  try:
    picture = images.resize_to(images.open_upright(data, example.id), image.max_side)
  except images.UnreadableImage as error:
    return error
  return StoredPicture(picture, images.to_jpeg(picture, image.quality))


def refine_read(
    examples: Sequence[SourceExample], found: Sequence[StoredPicture | images.UnreadableImage], refiner: Refiner,
    source: str,
) -> list[Record | images.UnreadableImage]:
  """One result per example of a window, in order: its record, or why its picture cannot be read.

  Args:
    examples: the window.
    found: what `read` made of each.
    refiner: what a refiner's settings have built.
    source: the source's name, for the records.
  """
  readable = [(example, stored) for example, stored in zip(examples, found, strict=True)
              if isinstance(stored, StoredPicture)]
  pictures = [Picture(stored.image, example.objects) for example, stored in readable]
  tags = refiner.tagger.tag(pictures)
  detections = refiner.detector.detect(pictures, tags)
  segments = refiner.segmenter.segment(pictures, detections)
  records = iter([_record(*pair, *refined, source)
                  for pair, *refined in zip(readable, detections, segments, strict=True)])
  return [next(records) if isinstance(stored, StoredPicture) else stored for stored in found]


def refine(
    examples: Sequence[SourceExample], refiner: Refiner, image: ImageSettings, source: str,
) -> list[Record | images.UnreadableImage]:
  """Both together for one window, whose pictures are read by threads at once."""
  with ThreadPoolExecutor() as pool:
    found = list(pool.map(lambda example: read(example, image), examples))
  return refine_read(examples, found, refiner, source)


def refine_photo(data: bytes, refiner: Refiner, image: ImageSettings = ImageSettings()) -> Record:
  """The record of one photo that nobody annotated, from the bytes of its file. Raises `UnreadableImage`."""
  (result,) = refine([SourceExample("photo", lambda: data)], refiner, image, "photo")
  if isinstance(result, images.UnreadableImage):
    raise result
  return result


def _record(
    example: SourceExample, stored: StoredPicture, detected: Detections, segments: Segments, source: str,
) -> Record:
  return Record(
      id=example.id, source=source, image=stored.jpeg, height=stored.image.height, width=stored.image.width,
      captions=example.captions, conversations=example.conversations,
      text_boxes=np.array(example.text_boxes, np.float32).reshape(-1, 4),
      tags=detected.tags, boxes=detected.boxes, scores=detected.scores,
      detection_features=detected.row_features, detection_boxes=detected.row_boxes, mask_features=segments.features,
      mask_ious=segments.ious, mask_areas=segments.areas, mask_rles=segments.rles)
