"""Boxes drawn over a photo, as a picture file."""

import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from refiner_export.pages.page import object_colour
from refiner_export.common.settings import require


def picture_format(path: str) -> str:
  """Pillow's name of the format that a file name asks for, e.g. `PNG`. Raises `UserError` for a name without one."""
  extension = os.path.splitext(path)[1].lower()
  Image.init()
  known = Image.registered_extensions().get(extension)
  require(known in Image.SAVE, f"{path}: no picture format has the extension {extension!r}: name a .png or .jpg file")
  return known


def draw_boxes(image: bytes, boxes: Sequence[np.ndarray], picture_format: str) -> bytes:
  """The photo with groups of boxes, each group in its colour and with its number, from 1.

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
    for corners in group * size:
      left, top, right, bottom = (*np.minimum(corners[:2], corners[2:]), *np.maximum(corners[:2], corners[2:]))
      pen.rectangle((left, top, right, bottom), outline=object_colour(number), width=stroke)
      label = pen.textbbox((left + stroke, top + stroke), str(number + 1), font=font)
      pen.rectangle((label[0] - stroke, label[1] - stroke, label[2] + stroke, label[3] + stroke), fill=object_colour(number))
      pen.text((left + stroke, top + stroke), str(number + 1), fill="white", font=font)
  written = io.BytesIO()
  picture.save(written, picture_format)
  return written.getvalue()
