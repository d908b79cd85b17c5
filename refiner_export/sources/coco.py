"""COCO: a folder of images with the official captions and instances files."""

import collections
import dataclasses
import functools
import json
from collections.abc import Iterator

import numpy as np
from etils import epath

from refiner_export.common.boxes import normalise
from refiner_export.common.files import hash_file
from refiner_export.common.settings import UserError, existing_path, require
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture, TextBoxes, ask
from refiner_export.sources.source import SourceSettings, Unit


@dataclasses.dataclass(unsafe_hash=True)
class Coco(SourceSettings):
  """COCO captions and instances; the pictures are those of the captions file, in the order of their ids.

  All pictures are one unit, because both files must be read before the first picture is known.

  Attributes:
    images: the folder, e.g. `coco/val2017`.
    captions: e.g. `coco/annotations/captions_val2017.json`.
    instances: e.g. `coco/annotations/instances_val2017.json`.
  """
  images: str
  captions: str
  instances: str

  name = "coco"

  def shards(self) -> list[Unit]:
    existing_path(self.images, "source.images", "Name the folder of COCO's JPEG files.")
    captions, instances = self._files()
    version = f"{hash_file(captions)} {hash_file(instances)}"
    annotations = _read_annotations(self.captions, self.instances, version)
    return [Unit(captions.name, len(annotations.images), version)]

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    return self.read_slice(unit)

  def read_slice(self, unit: Unit, start: int = 0, stop: int | None = None) -> Iterator[SourceExample]:
    folder = epath.Path(self.images)
    annotations = _read_annotations(self.captions, self.instances, unit.version)
    for image in annotations.images[start:stop]:
      try:
        yield annotations.example(image, folder)
      except (KeyError, TypeError) as error:
        raise _bad_entry(self.captions, self.instances, error) from error

  def _files(self) -> tuple[epath.Path, epath.Path]:
    remedy = "Name a JSON file of COCO's annotations."
    return (existing_path(self.captions, "source.captions", remedy),
            existing_path(self.instances, "source.instances", remedy))


@dataclasses.dataclass(frozen=True)
class _Annotations:
  """What both files say.

  Attributes:
    images: the entries of the captions file, in the order of their ids.
    captions_of, objects_of: image id -> its annotations in the order of their ids.
    categories: category id -> name in lower case.
  """
  images: list[dict]
  captions_of: dict[int, list[dict]]
  objects_of: dict[int, list[dict]]
  categories: dict[int, str]

  def example(self, image: dict, folder: epath.Path) -> SourceExample:
    captions = [entry["caption"].strip() for entry in self.captions_of[image["id"]]]
    annotations = self.objects_of[image["id"]]
    objects = []
    for entry in annotations:
      tag = self.categories[entry["category_id"]]
      objects += _objects(entry, tag, image["width"], image["height"])
    # A crowd is not an object, but it makes "the person" ambiguous all the same.
    frequency = collections.Counter(self.categories[entry["category_id"]] for entry in annotations)
    text_boxes = TextBoxes()
    conversations = []
    for thing in objects:
      if frequency[thing.tag] == 1:
        conversations.append(ask("rec", f"the {thing.tag}", text_boxes.placeholder(thing.box)))
    picture = SourcePicture((folder / image["file_name"]).read_bytes, tuple(objects), text_boxes.collected())
    return SourceExample(str(image["id"]), (picture,), tuple(captions), tuple(conversations))


def _objects(entry: dict, tag: str, width: int, height: int) -> list[SourceObject]:
  """The object of an annotation; nothing for a crowd and for a box without an area."""
  x, y, w, h = entry["bbox"]
  if entry["iscrowd"] or w <= 0 or h <= 0:
    return []
  segmentation = entry["segmentation"]
  mask = functools.partial(_decode_mask, segmentation, height, width) if segmentation else None
  return [SourceObject(tag, normalise((x, y, x + w, y + h), width, height), mask)]


def _decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
  """Polygons, or a run-length code plain or compressed -> bool (height, width)."""
  from pycocotools import mask as coco_mask  # only this source needs it
  if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
    return coco_mask.decode(segmentation).astype(bool)
  codes = coco_mask.frPyObjects(segmentation, height, width)
  return coco_mask.decode(coco_mask.merge(codes) if isinstance(codes, list) else codes).astype(bool)


# An export reads slices of the same two files many times. `version` is the hash of the files, so that files which were
# edited in between are read again.
@functools.lru_cache(maxsize=1)
def _read_annotations(captions_path: str, instances_path: str, version: str) -> _Annotations:
  captions = _read_json(captions_path, "source.captions")
  instances = _read_json(instances_path, "source.instances")
  try:
    categories = {category["id"]: category["name"].lower() for category in instances["categories"]}
    images = sorted(captions["images"], key=_id)
    return _Annotations(images, _by_image(captions["annotations"]), _by_image(instances["annotations"]), categories)
  except (KeyError, TypeError) as error:
    raise _bad_entry(captions_path, instances_path, error) from error


def _read_json(path: str, field: str) -> dict:
  try:
    content = json.loads(epath.Path(path).read_text())
  except ValueError as error:
    raise UserError(f"{field}: {path} is not JSON ({error})") from None
  require(isinstance(content, dict), f"{field}: {path} holds no COCO annotations")
  return content


def _by_image(annotations: list[dict]) -> dict[int, list[dict]]:
  """Image id -> its annotations, ordered by their ids; an image without annotations has an empty list."""
  grouped = collections.defaultdict(list)
  for entry in sorted(annotations, key=_id):
    grouped[entry["image_id"]].append(entry)
  return grouped


def _id(entry: dict) -> int:
  return entry["id"]


def _bad_entry(captions: str, instances: str, error: Exception) -> UserError:
  return UserError(f"{captions}, {instances}: bad or missing entry {error}: "
                   "these must be COCO's captions and instances files")
