"""What every page of pictures shares: the look, the boxes over a photo, and texts that refer to them."""

import base64
import dataclasses
import pathlib

import jinja2
import numpy as np

from refiner_export.manifest import Manifest
from refiner_export.record import BOX_PLACEHOLDER, Record
from refiner_export.sources import photos

# Readable both as a line on a photo and behind white text.
COLOURS = ("#d1495b", "#2a6fdb", "#2e8b57", "#b8651b", "#7b4fc9", "#0f8a8a", "#b03a83",
           "#5f7a17", "#8a5a44", "#4a6572")
_UNNAMED = "#6b7280"


@dataclasses.dataclass(frozen=True)
class Box:
  """A box to draw, in percent of the picture; the label of a dashed one is at its end, not at its start."""
  label: str
  colour: str
  left: float
  top: float
  width: float
  height: float
  dashed: bool = False

  @classmethod
  def of(cls, box: np.ndarray, label: str, colour: str, dashed: bool = False) -> "Box":
    """From xyxy corners in [0, 1]; corners given in the wrong order are put right."""
    corners = 100 * np.asarray(box, float).reshape(2, 2)
    (left, top), (width, height) = corners.min(axis=0), np.ptp(corners, axis=0)
    return cls(label, colour, *map(float, (left, top, width, height)), dashed)


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a text: plain words, or a chip that stands for a box."""
  text: str
  colour: str = ""
  coordinates: str = ""


def render(template: pathlib.Path, **values) -> str:
  """Fills a template, which may extend or import those beside this file. All values are escaped."""
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader([template.parent, pathlib.Path(__file__).parent]),
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  return environment.get_template(template.name).render(values)


def card(record: Record, boxes: list[Box], manifest: Manifest) -> dict:
  """What `card.html.jinja` needs of a record, with the boxes in the order of drawing: small ones over large ones."""
  credits = photos.credits() if manifest.source == photos.Photos.name else {}
  return {"id": record.id, "credit": credits.get(record.id, ""), "width": record.width, "height": record.height,
          "image": base64.b64encode(record.image).decode(),
          "boxes": sorted(boxes, key=lambda box: -box.width * box.height)}


def object_colour(number: int) -> str:
  return COLOURS[number % len(COLOURS)]


def text_parts(text: str, record: Record) -> list[Part]:
  """Splits a text at its `<box K>`; a box that is also an object's has that object's name and colour."""
  parts = []
  for position, piece in enumerate(BOX_PLACEHOLDER.split(text)):
    if position % 2 == 0:
      parts.append(Part(piece))
      continue
    box = record.text_boxes[int(piece)]
    same = np.flatnonzero(np.isclose(record.boxes, box, atol=1e-6).all(axis=1))
    parts.append(Part(record.tags[same[0]], object_colour(same[0]), format_corners(box)) if len(same)
                 else Part("box", _UNNAMED, format_corners(box)))
  return parts


def format_corners(box: np.ndarray) -> str:
  return "[" + ", ".join(f"{value:.3f}" for value in box) + "]"
