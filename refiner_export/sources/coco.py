"""COCO: a folder of images with the official captions and instances files."""

import collections
import dataclasses
import functools
import json

import numpy as np
from etils import epath

from refiner_export.common.settings import Settings, UserError, existing_path, require
from refiner_export.sources.base import SourceExample, SourceObject, TextBoxes, ask, normalise_box


@dataclasses.dataclass(unsafe_hash=True)
class Coco(Settings):
  """COCO captions and instances; the pictures are those of the captions file, in the order of their ids.

  Attributes:
    images: the folder, e.g. `coco/val2017`.
    captions: e.g. `coco/annotations/captions_val2017.json`.
    instances: e.g. `coco/annotations/instances_val2017.json`.
  """
  images: str
  captions: str
  instances: str

  name = "coco"

  def examples(self) -> list[SourceExample]:
    folder = existing_path(self.images, "source.images", "Name the folder of COCO's JPEG files.")
    captions, instances = _read(self.captions, "source.captions"), _read(self.instances, "source.instances")
    try:
      categories = {category["id"]: category["name"].lower() for category in instances["categories"]}
      captions_of, objects_of = _by_image(captions["annotations"]), _by_image(instances["annotations"])
      return [_example(image, folder, [entry["caption"].strip() for entry in captions_of[image["id"]]],
                       objects_of[image["id"]], categories)
              for image in sorted(captions["images"], key=lambda image: image["id"])]
    except (KeyError, TypeError) as error:
      raise UserError(f"{self.captions}, {self.instances}: bad or missing entry {error}: "
                      "these must be COCO's captions and instances files") from error


def _example(
    image: dict, folder: epath.Path, captions: list[str], annotations: list[dict], categories: dict[int, str],
) -> SourceExample:
  width, height = image["width"], image["height"]
  # A crowd is no object, but it makes "the person" ambiguous all the same.
  frequency = collections.Counter(categories[entry["category_id"]] for entry in annotations)
  objects = []
  for entry in annotations:
    tag, (x, y, w, h) = categories[entry["category_id"]], entry["bbox"]
    if entry["iscrowd"] or w <= 0 or h <= 0:
      continue
    mask = functools.partial(_decode_mask, entry["segmentation"], height, width) if entry["segmentation"] else None
    objects.append(SourceObject(tag, normalise_box((x, y, x + w, y + h), width, height), mask))
  text_boxes = TextBoxes()
  conversations = [ask("caption", "", caption) for caption in captions]
  conversations += [ask("rec", f"the {thing.tag}", text_boxes.placeholder(thing.box))
                    for thing in objects if frequency[thing.tag] == 1]
  return SourceExample(str(image["id"]), (folder / image["file_name"]).read_bytes, tuple(captions),
                       tuple(conversations), text_boxes.collected(), tuple(objects))


def _decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
  """Polygons, or a run-length code plain or compressed -> bool (height, width)."""
  from pycocotools import mask as coco_mask  # only this source needs it
  if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
    return coco_mask.decode(segmentation).astype(bool)
  codes = coco_mask.frPyObjects(segmentation, height, width)
  return coco_mask.decode(coco_mask.merge(codes) if isinstance(codes, list) else codes).astype(bool)


def _by_image(annotations: list[dict]) -> dict[int, list[dict]]:
  """Image id -> its annotations, ordered by their ids; an image without any has an empty list."""
  grouped = collections.defaultdict(list)
  for entry in sorted(annotations, key=lambda entry: entry["id"]):
    grouped[entry["image_id"]].append(entry)
  return grouped


def _read(path: str, field: str) -> dict:
  file = existing_path(path, field, "Name a JSON file of COCO's annotations.")
  try:
    content = json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f"{field}: {path} is not JSON ({error})") from None
  require(isinstance(content, dict), f"{field}: {path} holds no COCO annotations")
  return content
