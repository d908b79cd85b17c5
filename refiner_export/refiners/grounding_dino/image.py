"""Pictures as Grounding-DINO sees them. Needs no torch, so that worker processes start quickly."""

import dataclasses

import numpy as np
from PIL import Image

_STRIDES = 8, 16, 32, 64  # of the four feature maps that queries are chosen from


@dataclasses.dataclass(frozen=True)
class DetectorImage:
  """Resizes a picture, keeping its aspect, as transformers' GroundingDinoImageProcessor does.

  Attributes:
    shortest: pixels of the shorter side,
    longest: but no more of the longer side than this.
    queries: how many feature positions there must be at least.
  """
  shortest: int
  longest: int
  queries: int

  def __call__(self, image: Image.Image) -> np.ndarray:
    """An RGB picture -> uint8 (H, W, 3)."""
    height, width = self.size(image.height, image.width)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))

  def size(self, height: int, width: int) -> tuple[int, int]:
    """The size that a picture of this height and width is given."""
    small, large = sorted((height, width))
    exact = min(self.shortest, self.longest * small / large)
    short, long = round(exact), int(exact * large / small)
    if short == small:
      long = large  # transformers leaves such a picture as it is
    # A strip of a picture has fewer positions than there are queries to choose; it is widened until it has enough.
    while sum(-(-short // stride) * -(-long // stride) for stride in _STRIDES) < self.queries:
      short += _STRIDES[0]
    return (short, long) if height < width else (long, short)
