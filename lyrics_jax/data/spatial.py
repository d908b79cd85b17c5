"""The spatial representation (paper section 3.1): objects and their boxes as text that the model reads and writes.

An object is `<br><T> tag </T><Bbox> (x1,y1),(x2,y2) </Box></br>`; the objects of a picture follow each other in
descending score without a separator. Boxes are `xyxy` corners in [0, 1] of the picture, written with three decimals
("decimal", `0.125`) or as thousandths ("integer", `125`, at most 999).
"""

import re
from collections.abc import Sequence

import numpy as np

from refiner_export.records.record import BOX_PLACEHOLDER
from refiner_export.common.settings import require

SPECIAL_TOKENS = ("<br>", "</br>", "<T>", "</T>", "<Bbox>", "</Box>")

_NUMBER = r"\s*(\d+\.\d*|\.\d+|\d+)\s*"
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")


def format_box(box: Sequence[float], coordinates: str) -> str:
  """`(x1,y1),(x2,y2)` of an xyxy box in [0, 1]; `coordinates` is "decimal" or "integer"."""
  x1, y1, x2, y2 = (_format_number(value, coordinates) for value in box)
  return f"({x1},{y1}),({x2},{y2})"


def format_object(tag: str, box: Sequence[float], coordinates: str) -> str:
  """The text of one object, markers included."""
  return f"<br><T> {tag} </T>{_format_reference(box, coordinates)}</br>"


def referred_boxes(text: str) -> list[int]:
  """Indices K of the placeholders `<box K>` in a text, in order of appearance."""
  return [int(index) for index in BOX_PLACEHOLDER.findall(text)]


def fill_boxes(text: str, boxes: np.ndarray, coordinates: str) -> str:
  """Writes `<Bbox> (x1,y1),(x2,y2) </Box>` in place of every `<box K>`.

  Args:
    text: may hold placeholders.
    boxes: float32 (M, 4), xyxy in [0, 1]. A placeholder beyond M is a `UserError`.
    coordinates: "decimal" or "integer".
  """
  for index in referred_boxes(text):
    require(index < len(boxes), f"the text {text[:60]!r} refers to <box {index}>, but there are {len(boxes)} boxes: "
                                "number boxes from 0 and give one for each placeholder")
  return BOX_PLACEHOLDER.sub(lambda match: _format_reference(boxes[int(match[1])], coordinates), text)


def parse_boxes(text: str) -> np.ndarray:
  """Boxes written in a text, as float32 (n, 4) xyxy in [0, 1]; both forms of coordinates, malformed boxes are left out.

  A box with a decimal point anywhere is decimal, one without any is in thousandths.
  """
  boxes = [[float(number) if "." in "".join(corners) else float(number) / 1000 for number in corners]
           for corners in _CORNERS.findall(text)]
  return np.clip(np.array(boxes, np.float32).reshape(-1, 4), 0, 1)


def _format_reference(box: Sequence[float], coordinates: str) -> str:
  return f"<Bbox> {format_box(box, coordinates)} </Box>"


def _format_number(value: float, coordinates: str) -> str:
  thousandths = round(min(max(float(value), 0.0), 1.0) * 1000)
  return str(min(thousandths, 999)) if coordinates == "integer" else f"{thousandths / 1000:.3f}"
