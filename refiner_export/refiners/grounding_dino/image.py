"""Pictures as Grounding-DINO sees them."""

import dataclasses

import numpy as np
from PIL import Image

_STRIDES = 8, 16, 32, 64  # of the four feature maps from which queries are chosen


@dataclasses.dataclass(frozen=True)
class DetectorImage:
  """Resizes pictures and keeps their aspect, as GroundingDinoImageProcessor of transformers does.

  Attributes:
    shortest: pixels of the shorter side.
    longest: the most pixels of the longer side. The shorter side shrinks with it.
    queries: the least number of feature positions that a picture must have.
  """
  shortest: int
  longest: int
  queries: int

  def __call__(self, image: Image.Image) -> np.ndarray:
    """An RGB picture -> uint8 (H, W, 3)."""
    height, width = self.size(image.height, image.width)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))

  def size(self, height: int, width: int) -> tuple[int, int]:
    """Height and width that a picture of this height and width gets."""
    small, large = sorted((height, width))
    exact = min(self.shortest, self.longest * small / large)
    short, long = round(exact), int(exact * large / small)
    if short == small:
      long = large  # transformers does not resize such a picture
    # A narrow strip has fewer positions than there are queries to choose. It is widened until it has enough.
    while _positions(short, long) < self.queries:
      short += _STRIDES[0]
    return (short, long) if height < width else (long, short)


def _positions(short: int, long: int) -> int:
  """Positions in all feature maps of a picture with these sides."""
  total = 0
  for stride in _STRIDES:
    total += -(-short // stride) * -(-long // stride)  # -(-a // b) rounds up
  return total
