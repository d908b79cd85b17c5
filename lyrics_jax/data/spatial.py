"""The spatial representation (paper section 3.1): objects and their boxes as text that the model reads and writes.

An object is `<br><T> tag </T><Bbox> (x1,y1),(x2,y2) </Box></br>`; the objects of a picture follow each other in
descending score without a separator. Boxes are `xyxy` corners in [0, 1] of the picture, written with three decimals
("decimal", `0.125`) or as thousandths ("integer", `125`, at most 999).
"""

import re
from collections.abc import Sequence

import numpy as np

from refiner_export.common.settings import UserError, require
from refiner_export.records.record import BOX_PLACEHOLDER, IMAGE_PLACEHOLDER, image_placeholder

SPECIAL_TOKENS = ("<br>", "</br>", "<T>", "</T>", "<Bbox>", "</Box>")

_NUMBER = r"\s*(\d+\.\d*|\.\d+|\d+)\s*"
_BOX_WITHOUT_PICTURE = re.compile(r"<box (\d+)>")  # how records of schema 1 had it
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")


def format_box(box: Sequence[float], coordinates: str) -> str:
  """`(x1,y1),(x2,y2)` of an xyxy box in [0, 1]; `coordinates` is "decimal" or "integer"."""
  x1, y1, x2, y2 = [_format_number(value, coordinates) for value in box]
  return f"({x1},{y1}),({x2},{y2})"


def format_object(tag: str, box: Sequence[float], coordinates: str) -> str:
  """The text of one object with its markers."""
  return f"<br><T> {tag} </T>{_format_reference(box, coordinates)}</br>"


def referred_boxes(text: str) -> list[tuple[int, int]]:
  """(I, K) of the placeholders `<box I.K>` in a text, in order of appearance."""
  return [(int(picture), int(box)) for picture, box in BOX_PLACEHOLDER.findall(text)]


def referred_pictures(text: str) -> list[int]:
  """K of the placeholders `<image K>` in a text, in order of appearance."""
  return [int(picture) for picture in IMAGE_PLACEHOLDER.findall(text)]


def without_pictures(text: str) -> str:
  """The text without its placeholders `<image K>`, and without the white space that they leave at its ends."""
  return IMAGE_PLACEHOLDER.sub("", text).strip() if IMAGE_PLACEHOLDER.search(text) else text


def renumber_pictures(text: str, numbers: Sequence[int]) -> str:
  """The text with `<image numbers[K]>` written as `<image K>`."""

  def renumbered(match: re.Match) -> str:
    return image_placeholder(numbers.index(int(match[1])))

  return IMAGE_PLACEHOLDER.sub(renumbered, text)


def fill_boxes(text: str, boxes: Sequence[np.ndarray], coordinates: str) -> str:
  """Writes `<Bbox> (x1,y1),(x2,y2) </Box>` in place of every `<box I.K>`.

  Args:
    text: may hold placeholders.
    boxes: float32 (M, 4) for each picture, xyxy in [0, 1].
    coordinates: "decimal" or "integer".

  Raises:
    UserError: a placeholder names no picture, a picture that is not there, or a box that is not there.
  """
  without = _BOX_WITHOUT_PICTURE.search(text)
  if without:
    raise UserError(f"the text {text[:60]!r} has {without[0]}, which names no picture: write <box 0.{without[1]}>")
  for picture, box in referred_boxes(text):
    where = f"the text {text[:60]!r} refers to <box {picture}.{box}>"
    require(picture < len(boxes), f"{where}, but there are {len(boxes)} pictures: number pictures from 0")
    count = len(boxes[picture])
    require(box < count, f"{where}, but there are {count} boxes in picture {picture}: number boxes from 0 and give one "
                         "for each placeholder")

  def written(match: re.Match) -> str:
    return _format_reference(boxes[int(match[1])][int(match[2])], coordinates)

  return BOX_PLACEHOLDER.sub(written, text)


def parse_boxes(text: str) -> np.ndarray:
  """Boxes written in a text, as float32 (n, 4) xyxy in [0, 1]. Malformed boxes are left out.

  Both forms of coordinates are read. A box with a decimal point in some number is decimal, any other is in thousandths.
  """
  boxes = []
  for corners in _CORNERS.findall(text):
    scale = 1 if "." in "".join(corners) else 1000
    boxes.append([float(number) / scale for number in corners])
  return np.clip(np.array(boxes, np.float32).reshape(-1, 4), 0, 1)


def _format_reference(box: Sequence[float], coordinates: str) -> str:
  return f"<Bbox> {format_box(box, coordinates)} </Box>"


def _format_number(value: float, coordinates: str) -> str:
  thousandths = round(min(max(float(value), 0.0), 1.0) * 1000)
  return str(min(thousandths, 999)) if coordinates == "integer" else f"{thousandths / 1000:.3f}"
