"""From examples to records: read, turn upright, shrink, tag, detect, segment. Nothing is written here.

The pictures of a window of examples go through one part of the refiner after the other. A network forms its
batches within the window, out of pictures that have the same size as the network sees them: nothing is
padded, so the results of a picture do not depend on the other pictures of the window. A larger window has
fuller batches. `read` is the work that threads can do ahead of the networks.
"""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from refiner_export.common import images
from refiner_export.export.config import ImageSettings
from refiner_export.records.record import Picture, Record
from refiner_export.refiners.base import Detections, Refiner, Segments, UprightPicture
from refiner_export.sources.base import SourceExample, SourcePicture


@dataclasses.dataclass(frozen=True)
class StoredPicture:
  """A picture at the size that is stored, which is also what the refiner sees, and its JPEG."""
  image: Image.Image
  jpeg: bytes


def read(example: SourceExample, image: ImageSettings) -> tuple[StoredPicture, ...] | images.UnreadableImage:
  """Reads, decodes, turns, shrinks and encodes the pictures of an example, or says why one cannot be read."""
  stored = []
  for number, picture in enumerate(example.pictures):
    try:
      stored.append(_read_picture(picture, example.id, image))
    except images.UnreadableImage as error:
      if len(example.pictures) == 1:
        return error
      return images.UnreadableImage(example.id, f"picture {number}: {error.reason}")
  return tuple(stored)


def refine_read(
    examples: Sequence[SourceExample], found: Sequence[tuple[StoredPicture, ...] | images.UnreadableImage],
    refiner: Refiner, source: str,
) -> list[Record | images.UnreadableImage]:
  """One result per example of a window, in order: its record, or why one of its pictures cannot be read.

  Args:
    examples: the window.
    found: what `read` returned for each example.
    refiner: what a refiner's settings have built.
    source: the source's name, for the records.
  """
  upright = []  # the pictures of all examples that can be read, one after the other
  for example, stored in zip(examples, found, strict=True):
    if not isinstance(stored, images.UnreadableImage):
      for picture, seen in zip(example.pictures, stored, strict=True):
        upright.append(UprightPicture(seen.image, picture.objects))
  tags = refiner.tagger.tag(upright)
  detections = refiner.detector.detect(upright, tags)
  segments = refiner.segmenter.segment(upright, detections)

  refined = zip(detections, segments, strict=True)
  results = []
  for example, stored in zip(examples, found):
    if isinstance(stored, images.UnreadableImage):
      results.append(stored)
      continue
    pictures = []
    for picture, seen in zip(example.pictures, stored):
      pictures.append(_picture(picture, seen, *next(refined)))
    results.append(Record(
        id=example.id, source=source, pictures=tuple(pictures), captions=example.captions,
        conversations=example.conversations))
  return results


def refine(
    examples: Sequence[SourceExample], refiner: Refiner, image: ImageSettings, source: str,
) -> list[Record | images.UnreadableImage]:
  """`read` and `refine_read` for one window, whose examples are read by threads at once."""
  with ThreadPoolExecutor() as pool:
    found = list(pool.map(functools.partial(read, image=image), examples))
  return refine_read(examples, found, refiner, source)


def refine_photo(data: bytes, refiner: Refiner, image: ImageSettings = ImageSettings()) -> Record:
  """The record of one photo that nobody annotated, from the bytes of its file. Raises `UnreadableImage`."""
  example = SourceExample("photo", (SourcePicture(functools.partial(bytes, data)),))
  (result,) = refine([example], refiner, image, "photo")
  if isinstance(result, images.UnreadableImage):
    raise result
  return result


def _read_picture(picture: SourcePicture, id: str, image: ImageSettings) -> StoredPicture:
  """Raises `UnreadableImage`."""
  try:
    data = picture.read()
  except OSError as error:  # one missing file must not end an export of a million
    reason = f"cannot be read: {error.strerror or error}: {error.filename}"
    raise images.UnreadableImage(id, reason) from error
  upright = images.resize_to(images.open_upright(data, id), image.max_side)
  return StoredPicture(upright, images.to_jpeg(upright, image.quality))


def _picture(picture: SourcePicture, stored: StoredPicture, detected: Detections, segments: Segments) -> Picture:
  return Picture(
      image=stored.jpeg, height=stored.image.height, width=stored.image.width,
      tags=detected.tags, boxes=detected.boxes, scores=detected.scores,
      detection_features=detected.row_features, detection_boxes=detected.row_boxes, mask_features=segments.features,
      text_boxes=np.array(picture.text_boxes, np.float32).reshape(-1, 4),
      mask_ious=segments.ious, mask_areas=segments.areas, mask_rles=segments.rles, credit=picture.credit)
