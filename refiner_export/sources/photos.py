"""Annotated photos that scikit-image and scikit-learn carry: enough to try everything without a download."""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import pathlib
from collections.abc import Iterator

from etils import epath

from refiner_export.common.boxes import normalise
from refiner_export.common.files import hash_file, is_inside
from refiner_export.common.images import UnreadableImage, open_upright
from refiner_export.common.settings import UserError, existing_file, require
from refiner_export.records.record import Conversation, escape, is_text
from refiner_export.sources.base import Corners, SourceExample, SourceObject, SourcePicture, TextBoxes, ask
from refiner_export.sources.source import SourceSettings, Unit

_PACKAGED = epath.Path(__file__).parent / "photos.json"
_QUOTE = "'"
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclasses.dataclass(unsafe_hash=True)
class Photos(SourceSettings):
  """Photos from installed packages, with captions, boxes and questions that were written for this project.

  Attributes:
    annotations: a JSON file of the same form as the packaged `photos.json`; None takes the packaged file.
  """
  annotations: str | None = None

  name = "photos"

  def shards(self) -> list[Unit]:
    file = self._file()
    version = hash_file(file)
    return [Unit(file.name, len(_read_json(file)), version, (("annotations", version),))]

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    return self.read_slice(unit)

  def read_slice(self, unit: Unit, start: int = 0, stop: int | None = None) -> Iterator[SourceExample]:
    for photo in _read_json(self._file())[start:stop]:
      yield _example(photo)

  def _file(self) -> epath.Path:
    if self.annotations is None:
      return _PACKAGED
    return existing_file(self.annotations, "source.annotations", "Name a JSON list of annotated photos.")


def _read_json(file: epath.Path) -> list[dict]:
  """The entries, each with all that an example needs. Raises `UserError`, which names the entry and its id."""
  try:
    photos = json.loads(file.read_bytes())
  except (ValueError, RecursionError) as error:
    raise UserError(f"{file}: not JSON ({' '.join(str(error).split())}): mend the file") from None
  require(isinstance(photos, list), f"{file}: not a list of photos: mend the file")
  ids = set()
  for number, photo in enumerate(photos):
    where = f"{file}: photo {number}"
    require(isinstance(photo, dict) and is_text(photo.get("id")) and photo["id"] != "",
            f"{where}: bad or missing entry 'id': expected an object with a text as its id: mend the file")
    where = f"{file}: photo {ascii(photo['id']).strip(_QUOTE)}"
    require(photo["id"] not in ids, f"{where}: two photos have this id: mend the file")
    ids.add(photo["id"])
    try:
      _package_file(photo["package"], photo["file"])
      _check(photo)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
      raise UserError(f"{where}: bad or missing entry {error}: mend the file") from error
  return photos


def _check(photo: dict) -> None:
  """Makes the texts once with a picture of one pixel. Raises `KeyError` and others for what has another form."""
  for name in "objects", "captions", "questions":
    if not isinstance(photo[name], list):
      raise TypeError(f"{name!r}: expected a list")
  _annotated(photo, 1, 1)


def _example(photo: dict) -> SourceExample:
  file = _package_file(photo["package"], photo["file"])
  data = file.read_bytes()
  # The file gives boxes in pixels, and records want shares of the picture: its size is needed here already.
  try:
    width, height = open_upright(data, photo["id"]).size
  except UnreadableImage as error:
    return SourceExample(photo["id"], fault=error.reason)
  objects, text_boxes, conversations = _annotated(photo, width, height)
  version = functools.partial(str, hashlib.sha256(data).hexdigest())
  picture = SourcePicture(file.read_bytes, tuple(objects), text_boxes.collected(), photo.get("credit", ""),
                          size=(width, height), version=version)
  return SourceExample(photo["id"], (picture,), tuple(photo["captions"]), tuple(conversations))


def _annotated(photo: dict, width: int, height: int) -> tuple[list[SourceObject], TextBoxes, list[Conversation]]:
  objects = []
  for entry in photo["objects"]:
    objects.append(SourceObject(escape(entry["tag"].lower()), _box(entry["box"], width, height)))
  text_boxes = TextBoxes()
  return objects, text_boxes, _conversations(photo, objects, text_boxes)


def _box(box: list, width: int, height: int) -> Corners:
  """A number that is too large makes a box that the exporter leaves out."""
  if not isinstance(box, list) or not {*map(type, box)} <= {int, float}:
    raise TypeError(f"'box': {ascii(box)[:60]}: expected numbers")
  try:
    return normalise(box, width, height)
  except OverflowError:
    return (math.inf,) * 4


def _conversations(photo: dict, objects: list[SourceObject], text_boxes: TextBoxes) -> list[Conversation]:
  """Questions, the description of a region, and a question for each object whose name is unique in the photo."""
  conversations = [_question(entry, objects, text_boxes) for entry in photo["questions"]]
  described = objects[photo["description"]["object"]]
  conversations.append(ask("region", text_boxes.placeholder(described.box), escape(photo["description"]["text"])))
  frequency = collections.Counter(thing.tag for thing in objects)
  for thing in objects:
    if frequency[thing.tag] == 1:
      conversations.append(ask("rec", f"the {thing.tag}", text_boxes.placeholder(thing.box)))
  return conversations


def _question(entry: dict, objects: list[SourceObject], text_boxes: TextBoxes) -> Conversation:
  task, question = entry["task"], entry["question"]
  question = escape(question)
  if task == "where":
    return ask("dialogue", question, text_boxes.placeholder(objects[entry["object"]].box))
  if task == "multiple_choice":
    options = [f"({chr(ord('a') + k)}) {escape(option)}" for k, option in enumerate(entry["options"])]
    return ask("multiple_choice", " ".join([question, *options]), options[entry["answer"]])
  return ask("vqa", question, escape(entry["answer"]))


def _package_file(package: str, file: str) -> pathlib.Path:
  distribution = _DISTRIBUTIONS[package]
  spec = importlib.util.find_spec(package)  # finds the folder without importing the package
  require(spec is not None, f"photos need {distribution}: pip install {distribution}")
  folder = spec.submodule_search_locations[0]
  if not is_text(file) or not is_inside(folder, file):
    raise ValueError(f"'file': {ascii(file)[:60]} lies outside of {package}")
  path = pathlib.Path(folder) / file
  require(path.is_file(), f"{path}: this version of {distribution} lacks the photo: pip install -U {distribution}")
  return path
