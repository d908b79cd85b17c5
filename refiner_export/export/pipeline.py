"""From examples to records: read, turn upright, shrink, tag, detect, segment. Nothing is written here.

The pictures of a window of examples go through one part of the refiner after the other. A network forms its
batches within the window, out of pictures that have the same size as the network sees them: nothing is
padded, so the results of a picture do not depend on the other pictures of the window. A larger window has
fuller batches. `read` is the work that threads can do ahead of the networks.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from refiner_export.common import images
from refiner_export.common.orientation import turn_box, turn_mask, turns_sides
from refiner_export.export.config import ImageSettings, ReadingSettings
from refiner_export.export.fetching import fetch
from refiner_export.records.record import Picture, Record
from refiner_export.refiners.base import Detections, Refiner, Segments, UprightPicture
from refiner_export.sources.base import SourceExample, SourcePicture, current_version


@dataclasses.dataclass(frozen=True)
class StoredPicture:
  """A picture at the size that is stored, which is also what the refiner sees, and its JPEG.

  Attributes:
    source: what the source says of the picture, turned as the picture was.
    version: of the file; "" where the source does not say.
  """
  image: Image.Image
  jpeg: bytes
  source: SourcePicture
  version: str = ""


def read(
    example: SourceExample, image: ImageSettings, reading: ReadingSettings = ReadingSettings(),
) -> tuple[StoredPicture, ...] | images.UnreadableImage:
  """Reads, decodes, turns, shrinks and encodes the pictures of an example, or says why one cannot be read."""
  if example.fault:
    return images.UnreadableImage(example.id, example.fault)
  stored = []
  for number, picture in enumerate(example.pictures):
    try:
      stored.append(_read_picture(picture, example.id, image, reading))
    except images.UnreadableImage as error:
      if len(example.pictures) == 1:
        return error
      return images.UnreadableImage(example.id, f"picture {number}: {error.reason}", error.is_unread)
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
      for seen in stored:
        upright.append(UprightPicture(seen.image, seen.source.objects))
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
    for seen in stored:
      pictures.append(_picture(seen, *next(refined)))
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


def _read_picture(picture: SourcePicture, id: str, image: ImageSettings, reading: ReadingSettings) -> StoredPicture:
  """Raises `UnreadableImage`. A JPEG that needs no change is stored as it is, so that it loses nothing."""
  data = fetch(picture, id, reading)
  upright = images.open_turned(data, id, image.max_side)
  annotated = _turned_like(picture, upright, id)
  small = images.resize_to(upright.image, image.max_side)
  is_kept = upright.is_plain_jpeg and small is upright.image
  jpeg = data if is_kept else images.to_jpeg(small, image.quality)
  return StoredPicture(small, jpeg, annotated, current_version(picture))


def _turned_like(picture: SourcePicture, turned: images.Upright, id: str) -> SourcePicture:
  """The picture with its annotations as they lie in the upright picture.

  Raises:
    UnreadableImage: the annotations were made for a picture of another size.
  """
  width, height = turned.size
  stored = (height, width) if turns_sides(turned.orientation) else (width, height)
  fits_upright, fits_stored = picture.size in (None, turned.size), picture.size in (None, stored)
  if not fits_upright and not fits_stored:
    declared = "x".join(map(str, picture.size))
    raise images.UnreadableImage(id, f"{width}x{height} pixels, its annotations are for {declared}")
  if not fits_stored or turned.orientation == 1 or fits_upright and not picture.as_stored:
    return picture
  objects, text_boxes = [], []
  for thing in picture.objects:
    mask = functools.partial(_turned_mask, thing.mask, turned.orientation) if thing.mask else None
    objects.append(dataclasses.replace(thing, box=turn_box(thing.box, turned.orientation), mask=mask))
  for box in picture.text_boxes:
    text_boxes.append(turn_box(box, turned.orientation))
  return dataclasses.replace(picture, objects=tuple(objects), text_boxes=tuple(text_boxes))


def _turned_mask(mask: Callable[[], np.ndarray], orientation: int) -> np.ndarray:
  return turn_mask(mask(), orientation)


def _picture(stored: StoredPicture, detected: Detections, segments: Segments) -> Picture:
  return Picture(
      image=stored.jpeg, height=stored.image.height, width=stored.image.width,
      tags=detected.tags, boxes=detected.boxes, scores=detected.scores,
      detection_features=detected.row_features, detection_boxes=detected.row_boxes, mask_features=segments.features,
      text_boxes=np.array(stored.source.text_boxes, np.float32).reshape(-1, 4),
      mask_ious=segments.ious, mask_areas=segments.areas, mask_rles=segments.rles, credit=stored.source.credit)
