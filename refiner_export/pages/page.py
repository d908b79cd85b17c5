"""What every page of pictures shares: the look, the boxes over a photo, and texts that refer to boxes and pictures."""

import base64
import dataclasses
import io
import pathlib
from collections.abc import Sequence

import jinja2
import numpy as np
from PIL import Image, ImageColor

from refiner_export.common.boxes import order_corners
from refiner_export.records.masks import decode_rle
from refiner_export.records.record import BOX_PLACEHOLDER, IMAGE_PLACEHOLDER, Picture, Record

# Colours that are readable both as a line on a photo and behind white text.
COLOURS = ("#d1495b", "#2a6fdb", "#2e8b57", "#b8651b", "#7b4fc9", "#0f8a8a", "#b03a83",
           "#5f7a17", "#8a5a44", "#4a6572")
_UNNAMED = "#6b7280"
_INSIDE, _CONTOUR = 90, 230  # how opaque a mask is, of 255
_TEMPLATES = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Box:
  """A box to draw, in percent of the picture.

  A dashed box has its label at its end, so that the label does not hide the label of the solid box that it belongs to.
  `note` is what a mouse over the label shows. `number` is that of the object, where the box is an object's: a list of
  names below the photo points at the boxes by it.
  """
  label: str
  colour: str
  left: float
  top: float
  width: float
  height: float
  dashed: bool = False
  note: str = ""
  number: int | None = None

  @classmethod
  def of(
      cls, box: np.ndarray, label: str, colour: str, dashed: bool = False, note: str = "", number: int | None = None,
  ) -> "Box":
    """From (4,) xyxy in [0, 1]; corners in the wrong order are put right."""
    left, top, right, bottom = (100 * order_corners(np.asarray(box, float)[None])[0]).tolist()
    return cls(label, colour, left, top, right - left, bottom - top, dashed, note, number)

  @property
  def area(self) -> float:
    return self.width * self.height


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a text: plain words, or a chip that stands for a box or a picture."""
  text: str
  colour: str = ""
  coordinates: str = ""


def render(template: str, **values) -> str:
  """Fills a template of this folder. All values are escaped."""
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  return environment.get_template(template).render(values)


def photo(picture: Picture, boxes: Sequence[Box], alt: str, overlay: str = "") -> dict:
  """What the `photo` macro of `card.html.jinja` needs. Small boxes are drawn over large ones.

  Args:
    picture: the photo.
    boxes: to draw, in any order.
    alt: the text of the photo for people who do not see it.
    overlay: a PNG in base64 of the photo's size, such as `draw_masks` makes; "" for none.
  """
  by_size = sorted(boxes, key=lambda box: box.area, reverse=True)
  return {"image": base64.b64encode(picture.image).decode(), "width": picture.width, "height": picture.height,
          "boxes": by_size, "names": [box for box in boxes if box.number is not None], "overlay": overlay, "alt": alt}


def credits(record: Record) -> str:
  """Whom to thank for the pictures of a record, each name once."""
  names = []
  for picture in record.pictures:
    if picture.credit and picture.credit not in names:
      names.append(picture.credit)
  return " ".join(names)


def draw_masks(picture: Picture) -> str:
  """The masks of a picture's objects in their colours: a PNG in base64, "" without masks.

  Small masks lie over large ones. The inside of a mask is translucent, its contour is nearly solid.
  """
  if not picture.mask_rles:
    return ""
  masks = []
  for number, rle in enumerate(picture.mask_rles):
    masks.append((number, decode_rle(rle, picture.height, picture.width)))
  masks.sort(key=lambda entry: entry[1].sum(), reverse=True)
  canvas = np.zeros((picture.height, picture.width, 4), np.uint8)
  for number, mask in masks:
    colour = ImageColor.getrgb(object_colour(number))
    canvas[mask] = (*colour, _INSIDE)
    canvas[_contour(mask)] = (*colour, _CONTOUR)
  file = io.BytesIO()
  Image.fromarray(canvas).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()


def object_colour(number: int) -> str:
  """The colour of object `number` of a picture; colours repeat."""
  return COLOURS[number % len(COLOURS)]


def text_parts(text: str, record: Record) -> list[Part]:
  """Splits a text at its `<image K>` and `<box I.K>`.

  A box that is also an object's gets that object's name and colour.
  """
  parts = []
  # `split` returns the plain text at even positions and what the group matched between them.
  for position, piece in enumerate(IMAGE_PLACEHOLDER.split(text)):
    if position % 2:
      parts.append(Part(f"picture {int(piece) + 1}", _UNNAMED))
    else:
      parts += _box_parts(piece, record)
  return parts


def format_corners(box: np.ndarray) -> str:
  return "[" + ", ".join([f"{value:.3f}" for value in box]) + "]"


def _box_parts(text: str, record: Record) -> list[Part]:
  parts, end = [], 0
  for match in BOX_PLACEHOLDER.finditer(text):
    parts.append(Part(text[end:match.start()]))
    parts.append(_box_part(record.pictures[int(match[1])], int(match[2])))
    end = match.end()
  parts.append(Part(text[end:]))
  return parts


def _box_part(picture: Picture, number: int) -> Part:
  box = picture.text_boxes[number]
  same = np.flatnonzero(np.isclose(picture.boxes, box, atol=1e-6).all(axis=1))
  if len(same):
    return Part(picture.tags[same[0]], object_colour(same[0]), format_corners(box))
  return Part("box", _UNNAMED, format_corners(box))


def _contour(mask: np.ndarray) -> np.ndarray:
  """bool (H, W): the pixels of a mask that have a neighbour outside it."""
  padded = np.pad(mask, 1)
  inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
  return mask & ~inner
