"""Annotated photos that scikit-image and scikit-learn carry: enough to try everything without a download."""

import collections
import dataclasses
import importlib.util
import json
import pathlib

from etils import epath

from refiner_export.export.images import open_upright
from refiner_export.common.settings import Settings, UserError, existing_path, require
from refiner_export.sources.base import SourceExample, SourceObject, TextBoxes, ask, normalise_box

_PACKAGED = epath.Path(__file__).parent / "photos.json"
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclasses.dataclass(unsafe_hash=True)
class Photos(Settings):
  """Photos from installed packages with our own captions, boxes and questions.

  Attributes:
    annotations: a JSON file of the same form as the packaged `photos.json`; None takes that one.
  """
  annotations: str | None = None

  name = "photos"

  def examples(self) -> list[SourceExample]:
    path = _PACKAGED if self.annotations is None else existing_path(
        self.annotations, "source.annotations", "Name a JSON list of annotated photos.")
    try:
      photos = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(f"{path}: not JSON ({error}): mend the file") from None
    return [_example(photo, path) for photo in photos]


def credits() -> dict[str, str]:
  """Photo id -> whom to thank, from the packaged annotations."""
  return {photo["id"]: photo["credit"] for photo in json.loads(_PACKAGED.read_text())}


def _example(photo: dict, annotations: epath.Path) -> SourceExample:
  file = _package_file(photo["package"], photo["file"])
  # Boxes are in pixels, so the picture's size is needed here already.
  width, height = open_upright(file.read_bytes(), photo["id"]).size
  try:
    return _annotate(photo, file, width, height)
  except (KeyError, IndexError, TypeError) as error:
    raise UserError(f"{annotations}: photo {photo['id']}: bad or missing entry {error}: mend the file") from error


def _annotate(photo: dict, file: pathlib.Path, width: int, height: int) -> SourceExample:
  objects = tuple(SourceObject(entry["tag"].lower(), normalise_box(entry["box"], width, height))
                  for entry in photo["objects"])
  text_boxes = TextBoxes()
  box = lambda index: text_boxes.placeholder(objects[index].box)
  conversations = [ask("caption", "", photo["captions"][0])]
  for entry in photo["questions"]:
    task, question = entry["task"], entry["question"]
    if task == "where":
      conversations.append(ask("dialogue", question, box(entry["object"])))
    elif task == "multiple_choice":
      options = [f"({chr(ord('a') + k)}) {option}" for k, option in enumerate(entry["options"])]
      conversations.append(ask("multiple_choice", " ".join([question, *options]), options[entry["answer"]]))
    else:
      conversations.append(ask("vqa", question, entry["answer"]))
  conversations.append(ask("region", box(photo["description"]["object"]), photo["description"]["text"]))
  frequency = collections.Counter(thing.tag for thing in objects)
  conversations += [ask("rec", f"the {thing.tag}", box(k))
                    for k, thing in enumerate(objects) if frequency[thing.tag] == 1]
  return SourceExample(photo["id"], file.read_bytes, tuple(photo["captions"]), tuple(conversations),
                       text_boxes.collected(), objects)


def _package_file(package: str, file: str) -> pathlib.Path:
  distribution = _DISTRIBUTIONS[package]
  spec = importlib.util.find_spec(package)  # finds the folder without importing the package
  require(spec is not None, f"photos need {distribution}: pip install {distribution}")
  path = pathlib.Path(spec.submodule_search_locations[0]) / file
  require(path.exists(), f"{path}: this version of {distribution} lacks the photo: pip install -U {distribution}")
  return path
