"""Pictures as SAM-HQ sees them. Needs no torch, so that worker processes start quickly."""

import dataclasses

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class SegmenterImage:
  """Resizes a picture so that its longer side is `side` pixels and pads it right and below, as for the training."""
  side: int

  def __call__(self, image: Image.Image) -> np.ndarray:
    """An RGB picture -> uint8 (side, side, 3), zeros outside the picture."""
    width, height = self.extent(image.size)
    padded = np.zeros((self.side, self.side, 3), np.uint8)
    padded[:height, :width] = image.resize((width, height), Image.Resampling.BILINEAR)
    return padded

  def extent(self, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that a picture of this width and height takes of the square; rounded as upstream does."""
    return tuple(max(1, int(length * self.side / max(size) + 0.5)) for length in size)
