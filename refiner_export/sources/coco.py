"""COCO: a folder of images with annotation files in COCO's form, as LVIS, CVAT and Roboflow also write them."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from refiner_export.common.boxes import normalise
from refiner_export.common.files import hash_file, is_inside, is_local, stamp
from refiner_export.common.regular_file import UnfitFile, read_regular
from refiner_export.common.settings import existing_file, existing_path, require
from refiner_export.records.record import escape, is_text
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture, TextBoxes, ask
from refiner_export.sources.coco_index import Index, Listed, as_key, read_index
from refiner_export.sources.coco_masks import NO_MASK, mask_of, version_of
from refiner_export.sources.source import SourceSettings, Unit


@dataclasses.dataclass(unsafe_hash=True)
class Coco(SourceSettings):
  """Captions and objects of pictures, in the order of the pictures' ids.

  All pictures are one unit, because the files must be read before the first picture is known.

  Attributes:
    images: the folder, e.g. `coco/val2017`. Pictures outside of it are skipped.
    captions: e.g. `coco/annotations/captions_val2017.json`, which lists the pictures; None where there are no captions.
    instances: e.g. `coco/annotations/instances_val2017.json`; None where there are no objects. It lists the pictures
      where `captions` is None.
    as_stored: whether boxes were drawn on pictures as they are stored, by a tool that does not turn them. The size of a
      picture tells that too, but not for pictures stored upside down or mirrored, and not for square ones.
  """
  images: str
  captions: str | None = None
  instances: str | None = None
  as_stored: bool = False

  name = "coco"

  def check(self, path: str) -> None:
    super().check(path)
    require(bool(self.captions or self.instances), f"{path}: name captions, instances or both")

  def shards(self) -> list[Unit]:
    existing_path(self.images, "source.images", "Name the folder of COCO's JPEG files.")
    parts = []
    for name, file in zip(("captions", "instances"), self._files()):
      if file is not None:
        parts.append((name, hash_file(file)))
    version = " ".join([digest for _, digest in parts])
    name = (self._files()[0] or self._files()[1]).name
    return [Unit(name, len(self._index(version).pictures), version, tuple(parts))]

  def unmatched(self, unit: Unit) -> Mapping[str, int]:
    return self._index(unit.version).unmatched

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    return self.read_slice(unit)

  def read_slice(self, unit: Unit, start: int = 0, stop: int | None = None) -> Iterator[SourceExample]:
    index, folder = self._index(unit.version), epath.Path(self.images).expanduser()
    for number in range(*slice(start, stop).indices(len(index.pictures))):
      yield _example(index, number, folder, self.as_stored)

  def picture_versions(self, unit: Unit, start: int, stop: int | None) -> Iterator[tuple[str, Sequence[str]]]:
    folder = epath.Path(self.images).expanduser()
    for picture in self._index(unit.version).pictures[start:stop]:
      try:
        versions = (_stamp(folder, picture.file),)
      except (OSError, ValueError):
        versions = ("",)
      yield str(picture.key), versions

  def _index(self, version: str) -> Index:
    return read_index(*self._files(), version)

  def _files(self) -> tuple[epath.Path | None, epath.Path | None]:
    remedy = "Name a JSON file of COCO's annotations."
    captions = existing_file(self.captions, "source.captions", remedy) if self.captions else None
    instances = existing_file(self.instances, "source.instances", remedy) if self.instances else None
    return captions, instances


def _example(index: Index, number: int, folder: epath.Path, as_stored: bool) -> SourceExample:
  listed, dropped = index.pictures[number], []
  captions = []
  for entry in index.captions.of(number) if index.captions else ():
    caption = entry["caption"]
    captions.append(caption.strip() if isinstance(caption, str) else caption)  # the exporter judges all captions alike
  annotations = list(index.objects.of(number)) if index.objects else []
  objects, frequency = [], collections.Counter()
  for entry in annotations:
    tag = _tag(index, entry["category_id"])
    frequency[tag] += 1  # a crowd is not an object, but it makes "the person" ambiguous all the same
    thing = _object(entry, tag, listed, dropped)
    if thing is not None:
      objects.append(thing)
  text_boxes = TextBoxes()
  conversations = []
  for thing in objects:
    if frequency[thing.tag] == 1:
      conversations.append(ask("rec", f"the {thing.tag}", text_boxes.placeholder(thing.box)))
  # An object store would be asked once more for each picture.
  version = functools.partial(_stamp, folder, listed.file) if is_local(folder) else None
  picture = SourcePicture(
      functools.partial(_read_inside, folder, listed.file), tuple(objects), text_boxes.collected(),
      size=(listed.width, listed.height), as_stored=as_stored, version=version)
  return SourceExample(str(listed.key), (picture,), tuple(captions), tuple(conversations), tuple(dropped))


def _tag(index: Index, category: object) -> str | None:
  """The name of a category; "" for a name that cannot be stored, None where there is no such category."""
  name = index.categories.get(as_key(category))
  if name is None:
    return None
  return escape(" ".join(name.split()).lower()) if is_text(name) else ""


def _object(entry: dict, tag: str | None, listed: Listed, dropped: list[str]) -> SourceObject | None:
  """The object of an annotation; None for a crowd, and for what is left out for a reason."""
  if entry.get("iscrowd"):
    return None
  x, y, w, h = entry["bbox"]
  reason = _fault(x, y, w, h, tag, listed)
  if reason:
    dropped.append(f"object: {reason}")
    return None
  segmentation, mask = entry.get("segmentation"), None
  try:
    mask = mask_of(segmentation, listed.height, listed.width)
  except ValueError:
    dropped.append(NO_MASK)
  version = version_of(segmentation) if mask else ""
  return SourceObject(tag, normalise((x, y, x + w, y + h), listed.width, listed.height), mask, version)


def _fault(x: float, y: float, w: float, h: float, tag: str | None, listed: Listed) -> str:
  """Why an annotation is of no use; "" for a good one."""
  if tag is None:
    return "its category_id is no category's id"
  if not tag:
    return "its category has no name"
  if not all(map(math.isfinite, map(_to_float, (x, y, w, h)))):
    return "a number of its box is not finite"
  if w <= 0 or h <= 0:
    return "its box has no area"
  if x >= listed.width or y >= listed.height or x + w <= 0 or y + h <= 0:
    return "its box lies outside of the picture"
  return ""


def _to_float(value: float) -> float:
  """A number of JSON may be too large for a float: it counts as infinite."""
  try:
    return float(value)
  except OverflowError:
    return math.inf


def _read_inside(folder: epath.Path, name: str) -> bytes:
  """Raises `UnfitFile` for a name that leads out of the folder."""
  if not is_inside(folder, name):
    raise UnfitFile(f"{ascii(name)[:200]} lies outside of {folder}")
  return read_regular(folder / name)


def _stamp(folder: epath.Path, name: str) -> str:
  return stamp(folder / name)
