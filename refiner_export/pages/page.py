"""What every page of pictures shares: the look, the boxes over a photo, and texts that refer to them."""

import base64
import dataclasses
import io
import pathlib

import jinja2
import numpy as np
from PIL import Image, ImageColor

from refiner_export.records.manifest import Manifest
from refiner_export.records.masks import decode_rle
from refiner_export.records.record import BOX_PLACEHOLDER, Record
from refiner_export.sources import photos

# Readable both as a line on a photo and behind white text.
COLOURS = ("#d1495b", "#2a6fdb", "#2e8b57", "#b8651b", "#7b4fc9", "#0f8a8a", "#b03a83",
           "#5f7a17", "#8a5a44", "#4a6572")
_UNNAMED = "#6b7280"
_INSIDE, _CONTOUR = 90, 230  # how opaque a mask is, of 255


@dataclasses.dataclass(frozen=True)
class Box:
  """A box to draw, in percent of the picture; the label of a dashed one is at its end, not at its start.

  `note` is what a mouse over the label shows.
  """
  label: str
  colour: str
  left: float
  top: float
  width: float
  height: float
  dashed: bool = False
  note: str = ""

  @classmethod
  def of(cls, box: np.ndarray, label: str, colour: str, dashed: bool = False, note: str = "") -> "Box":
    """From xyxy corners in [0, 1]; corners given in the wrong order are put right."""
    corners = 100 * np.asarray(box, float).reshape(2, 2)
    (left, top), (width, height) = corners.min(axis=0), np.ptp(corners, axis=0)
    return cls(label, colour, *map(float, (left, top, width, height)), dashed, note)


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
          "image": base64.b64encode(record.image).decode(), "overlay": "",
          "boxes": sorted(boxes, key=lambda box: -box.width * box.height)}


def draw_masks(record: Record) -> str:
  """The masks of a record's objects in their colours, for `card["overlay"]`: a PNG in base64, "" without masks.

  Small ones lie over large ones; the inside is translucent, the contour is not.
  """
  if not record.mask_rles:
    return ""
  canvas = np.zeros((record.height, record.width, 4), np.uint8)
  masks = [decode_rle(rle, record.height, record.width) for rle in record.mask_rles]
  for k in sorted(range(len(masks)), key=lambda k: -masks[k].sum()):
    colour = ImageColor.getrgb(object_colour(k))
    canvas[masks[k]] = (*colour, _INSIDE)
    canvas[_contour(masks[k])] = (*colour, _CONTOUR)
  file = io.BytesIO()
  Image.fromarray(canvas).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()


def _contour(mask: np.ndarray) -> np.ndarray:
  """bool (H, W): the pixels of a mask beside one that is not in it."""
  padded = np.pad(mask, 1)
  inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
  return mask & ~inner


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
