"""Views of a picture: a view is the part of the picture that is seen, and whether it is mirrored.

A view applies alike to the picture and to its boxes. `fit` says how the part becomes the square that the model sees:

  squash  the part is resized to a square; its aspect is lost (Lyrics, BLIP-2).
  crop    the largest square in the middle of the part is seen (CLIP).
  pad     the smallest square around the part is seen; outside of the picture it has CLIP's mean colour (LLaVA 1.5).
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image

from refiner_export.common import boxes as geometry

Fit = Literal["squash", "crop", "pad"]

MEAN_COLOUR = (122, 116, 104)  # of CLIP's training pictures, RGB


@dataclasses.dataclass(frozen=True)
class View:
  """The part of a picture that is seen: corners in [0, 1] of the picture, then mirrored if `flip`.

  The default is the whole picture as it is. A part may reach beyond the picture. The part is resized to a square
  without keeping its aspect, so that boxes in [0, 1] of the part are boxes in [0, 1] of the square.
  """
  x1: float = 0.0
  y1: float = 0.0
  x2: float = 1.0
  y2: float = 1.0
  flip: bool = False

  def image(self, picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (height, width, 3) to uint8 (size, size, 3), bicubic with antialiasing."""
    height, width = picture.shape[:2]
    left, top, right, bottom = self.x1 * width, self.y1 * height, self.x2 * width, self.y2 * height
    image = Image.fromarray(picture)
    # Resizing reads no pixel outside of an image, so the picture is first laid on a canvas that holds the whole part.
    margin_left, margin_top = _pixels_outside(-left), _pixels_outside(-top)
    margin_right, margin_bottom = _pixels_outside(right - width), _pixels_outside(bottom - height)
    if margin_left or margin_top or margin_right or margin_bottom:
      canvas_size = (width + margin_left + margin_right, height + margin_top + margin_bottom)
      canvas = Image.new("RGB", canvas_size, MEAN_COLOUR)
      canvas.paste(image, (margin_left, margin_top))
      image = canvas
    box = (left + margin_left, top + margin_top, right + margin_left, bottom + margin_top)
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], image.width), min(box[3], image.height))  # rounding errors
    seen = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return np.ascontiguousarray(seen[:, ::-1]) if self.flip else seen

  def boxes_xyxy(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the picture as boxes of the view.

    Args:
      boxes: float32 (n, 4), xyxy in [0, 1] of the picture.

    Returns:
      float32 (n, 4), xyxy in [0, 1] of the view, clipped to it; bool (n,), whether the view shows enough of the box,
      see `boxes.clip`.
    """
    origin = np.array([self.x1, self.y1] * 2, np.float32)
    extent = np.array([self.x2 - self.x1, self.y2 - self.y1] * 2, np.float32)
    moved = (boxes.astype(np.float32) - origin) / extent
    if self.flip:
      moved = np.stack([1 - moved[:, 2], moved[:, 1], 1 - moved[:, 0], moved[:, 3]], axis=1)
    return geometry.clip(moved)

  def boxes_cxcywh(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `boxes_xyxy`, for boxes that are given and returned as centre and size."""
    clipped, visible = self.boxes_xyxy(geometry.to_xyxy(boxes))
    return geometry.to_cxcywh(clipped), visible

  def fitted(self, fit: Fit, width: int, height: int) -> "View":
    """The view with its part made square by `fit`, for a picture of `width` by `height` pixels."""
    if fit == "squash":
      return self
    wide, high = (self.x2 - self.x1) * width, (self.y2 - self.y1) * height
    side = min(wide, high) if fit == "crop" else max(wide, high)
    # Whole pixels in front of the part, as CLIP's and LLaVA's own code rounds them.
    left = self.x1 * width + _half(wide - side)
    top = self.y1 * height + _half(high - side)
    return View(left / width, top / height, (left + side) / width, (top + side) / height, self.flip)


def sample_view(rng: np.random.Generator, crop_scale: tuple[float, float], flip: bool) -> View:
  """A random resized crop, mirrored half of the time when `flip` is allowed.

  The rule is torchvision's: a share of the area uniform in `crop_scale`, an aspect log-uniform in [3/4, 4/3], ten
  tries. The aspect is relative to the picture's aspect, not to a square. So crops are distributed about the whole
  picture, which is what evaluation sees, and a `crop_scale` of (1, 1) crops nothing.
  """
  mirrored = flip and bool(rng.random() < 0.5)
  for _ in range(10):
    area = rng.uniform(*crop_scale)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    if width <= 1 and height <= 1:
      x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
      return View(x, y, min(x + width, 1.0), min(y + height, 1.0), mirrored)
  return View(flip=mirrored)


def _pixels_outside(distance: float) -> int:
  """Whole pixels that a margin of this width needs; 0 for a negative width. A rounding error needs none."""
  return max(math.ceil(distance - 1e-6), 0)


def _half(difference: float) -> int:
  """Half of a number of pixels, rounded towards zero."""
  return int(difference / 2)
