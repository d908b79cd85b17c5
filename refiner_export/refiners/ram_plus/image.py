"""Pictures as RAM++ sees them. Needs no torch, so that worker processes start quickly."""

import dataclasses

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class TaggerImage:
  """Resizes a picture to a square of `side` pixels; the aspect is not kept, as in training."""
  side: int

  def __call__(self, image: Image.Image) -> np.ndarray:
    """An RGB picture -> uint8 (side, side, 3)."""
    return np.asarray(image.resize((self.side, self.side), Image.Resampling.BILINEAR))
