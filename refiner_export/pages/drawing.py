"""Boxes drawn over a photo, as a picture file."""

import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from refiner_export.common.boxes import order_corners
from refiner_export.common.settings import require
from refiner_export.pages.page import object_colour


def picture_format(path: str) -> str:
  """Pillow's name of the format of a file name, e.g. `PNG`. Raises `UserError` for an unknown extension."""
  extension = os.path.splitext(path)[1].lower()
  Image.init()
  known = Image.registered_extensions().get(extension)
  require(known in Image.SAVE, f"{path}: no picture format has the extension {extension!r}: name a .png or .jpg file")
  return known


def draw_boxes(image: bytes, boxes: Sequence[np.ndarray], picture_format: str) -> bytes:
  """The photo with groups of boxes. A group has one colour and one number, from 1.

  Args:
    image: bytes of a picture file.
    boxes: a group per answer, (n, 4) xyxy in [0, 1] of the picture.
    picture_format: of the result, Pillow's name.
  """
  with Image.open(io.BytesIO(image)) as opened:
    picture = opened.convert("RGB")
  pen, size = ImageDraw.Draw(picture), np.array([picture.width - 1, picture.height - 1] * 2)
  stroke = max(2, round(max(picture.size) / 200))
  font = ImageFont.load_default(max(11, max(picture.size) // 36))
  for number, group in enumerate(boxes):
    colour, label = object_colour(number), str(number + 1)
    for left, top, right, bottom in order_corners(group * size):
      pen.rectangle((left, top, right, bottom), outline=colour, width=stroke)
      at = (left + stroke, top + stroke)
      x1, y1, x2, y2 = pen.textbbox(at, label, font=font)
      pen.rectangle((x1 - stroke, y1 - stroke, x2 + stroke, y2 + stroke), fill=colour)
      pen.text(at, label, fill="white", font=font)
  written = io.BytesIO()
  picture.save(written, picture_format)
  return written.getvalue()
