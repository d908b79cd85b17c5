"""Pictures and views of them: a view is a crop and a flip, applied alike to the picture and to its boxes."""

import dataclasses
import io
import math
import re

import numpy as np
from PIL import Image

VISIBLE_SHARE = 0.3  # an object of which less than this share of its area remains is left outside

_SIDES = re.compile(r"\b(left|right)|[左右]", re.IGNORECASE)


def decode(data: bytes) -> np.ndarray:
  """JPEG bytes to uint8 (height, width, 3) RGB. Raises `OSError` for bytes that are no picture."""
  with Image.open(io.BytesIO(data)) as image:
    return np.asarray(image.convert("RGB"))


def mentions_side(text: str) -> bool:
  """Whether a text says left or right (leftmost, right-hand, ...), so that its picture must not be flipped."""
  return _SIDES.search(text) is not None


@dataclasses.dataclass(frozen=True)
class View:
  """The part of a picture that is seen: corners in [0, 1] of the picture, then mirrored if `flip`.

  The default is the whole picture as it is. The part is resized to a square without keeping its aspect, so that boxes
  in [0, 1] of the part are boxes in [0, 1] of the square.
  """
  x1: float = 0.0
  y1: float = 0.0
  x2: float = 1.0
  y2: float = 1.0
  flip: bool = False

  def image(self, picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (height, width, 3) to uint8 (size, size, 3), bicubic with antialiasing."""
    height, width = picture.shape[:2]
    box = (self.x1 * width, self.y1 * height, self.x2 * width, self.y2 * height)
    seen = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC, box=box))
    return np.ascontiguousarray(seen[:, ::-1]) if self.flip else seen

  def boxes_xyxy(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the picture as boxes of the view.

    Args:
      boxes: float32 (n, 4), xyxy in [0, 1] of the picture.

    Returns:
      float32 (n, 4), xyxy in [0, 1] of the view, clipped to it; bool (n,), True where at least `VISIBLE_SHARE` of the
      box remains (for a box without area: where its centre remains).
    """
    origin = np.array([self.x1, self.y1] * 2, np.float32)
    moved = (boxes.astype(np.float32) - origin) / np.array([self.x2 - self.x1, self.y2 - self.y1] * 2, np.float32)
    if self.flip:
      moved = np.stack([1 - moved[:, 2], moved[:, 1], 1 - moved[:, 0], moved[:, 3]], axis=1)
    clipped = np.clip(moved, 0, 1)
    area, remaining = _area(moved), _area(clipped)
    centre = (moved[:, :2] + moved[:, 2:]) / 2
    inside = ((centre >= 0) & (centre <= 1)).all(axis=1)
    return clipped, np.where(area > 0, remaining >= VISIBLE_SHARE * area, inside)

  def boxes_cxcywh(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for boxes given, and returned, as centre and size."""
    clipped, visible = self.boxes_xyxy(to_xyxy(boxes))
    return to_cxcywh(clipped), visible


def sample_view(rng: np.random.Generator, crop_scale: tuple[float, float], flip: bool) -> View:
  """A random resized crop, mirrored half of the time when `flip` is allowed.

  The rule is torchvision's: a share of the area uniform in `crop_scale`, an aspect log-uniform in [3/4, 4/3], ten
  tries. The aspect is relative to the picture's own, so that crops are distributed about the whole picture, which is
  what evaluation sees, and a `crop_scale` of (1, 1) crops nothing.
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


def to_xyxy(boxes: np.ndarray) -> np.ndarray:
  """(n, 4) centre and size to corners."""
  return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def to_cxcywh(boxes: np.ndarray) -> np.ndarray:
  """(n, 4) corners to centre and size."""
  return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def _area(boxes: np.ndarray) -> np.ndarray:
  return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
