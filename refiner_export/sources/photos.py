"""Annotated photos that scikit-image and scikit-learn carry: enough to try everything without a download."""

import collections
import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Iterator

from etils import epath

from refiner_export.common.boxes import normalise
from refiner_export.common.files import hash_file
from refiner_export.common.images import open_upright
from refiner_export.common.settings import UserError, existing_path, require
from refiner_export.records.record import Conversation
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture, TextBoxes, ask
from refiner_export.sources.source import SourceSettings, Unit

_PACKAGED = epath.Path(__file__).parent / "photos.json"
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
    return [Unit(file.name, len(_read_json(file)), hash_file(file))]

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    return self.read_slice(unit)

  def read_slice(self, unit: Unit, start: int = 0, stop: int | None = None) -> Iterator[SourceExample]:
    file = self._file()
    for photo in _read_json(file)[start:stop]:
      yield _example(photo, file)

  def _file(self) -> epath.Path:
    if self.annotations is None:
      return _PACKAGED
    return existing_path(self.annotations, "source.annotations", "Name a JSON list of annotated photos.")


def _read_json(file: epath.Path) -> list[dict]:
  try:
    return json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f"{file}: not JSON ({error}): mend the file") from None


def _example(photo: dict, annotations: epath.Path) -> SourceExample:
  file = _package_file(photo["package"], photo["file"])
  # The file gives boxes in pixels, and records want shares of the picture: its size is needed here already.
  width, height = open_upright(file.read_bytes(), photo["id"]).size
  try:
    objects = []
    for entry in photo["objects"]:
      objects.append(SourceObject(entry["tag"].lower(), normalise(entry["box"], width, height)))
    text_boxes = TextBoxes()
    conversations = _conversations(photo, objects, text_boxes)
    picture = SourcePicture(file.read_bytes, tuple(objects), text_boxes.collected(), photo.get("credit", ""))
    return SourceExample(photo["id"], (picture,), tuple(photo["captions"]), tuple(conversations))
  except (KeyError, IndexError, TypeError) as error:
    raise UserError(f"{annotations}: photo {photo['id']}: bad or missing entry {error}: mend the file") from error


def _conversations(photo: dict, objects: list[SourceObject], text_boxes: TextBoxes) -> list[Conversation]:
  """Questions, the description of a region, and a question for each object whose name is unique in the photo."""
  conversations = [_question(entry, objects, text_boxes) for entry in photo["questions"]]
  described = objects[photo["description"]["object"]]
  conversations.append(ask("region", text_boxes.placeholder(described.box), photo["description"]["text"]))
  frequency = collections.Counter(thing.tag for thing in objects)
  for thing in objects:
    if frequency[thing.tag] == 1:
      conversations.append(ask("rec", f"the {thing.tag}", text_boxes.placeholder(thing.box)))
  return conversations


def _question(entry: dict, objects: list[SourceObject], text_boxes: TextBoxes) -> Conversation:
  task, question = entry["task"], entry["question"]
  if task == "where":
    return ask("dialogue", question, text_boxes.placeholder(objects[entry["object"]].box))
  if task == "multiple_choice":
    options = [f"({chr(ord('a') + k)}) {option}" for k, option in enumerate(entry["options"])]
    return ask("multiple_choice", " ".join([question, *options]), options[entry["answer"]])
  return ask("vqa", question, entry["answer"])


def _package_file(package: str, file: str) -> pathlib.Path:
  distribution = _DISTRIBUTIONS[package]
  spec = importlib.util.find_spec(package)  # finds the folder without importing the package
  require(spec is not None, f"photos need {distribution}: pip install {distribution}")
  path = pathlib.Path(spec.submodule_search_locations[0]) / file
  require(path.exists(), f"{path}: this version of {distribution} lacks the photo: pip install -U {distribution}")
  return path
