"""A fixed descriptor of a region of a picture: 256 numbers for shape, colour and contrast.

The region is resized to 32x32 pixels and cut into 4x4 cells of 8x8 pixels. The columns of the descriptor are:

  columns     content                                    order                                scale
  0..191      histogram of oriented gradients of the     cell row, cell column, orientation   see below
              lightness L, in one block over all cells   (12 of them)
  192..239    mean colour in CIELAB                      cell row, cell column, (L, a, b)     (L-50)/25, a/20, b/20
  240..255    contrast: standard deviation of L          cell row, cell column                /10

A gradient column is the square root of its share of all gradients. The 192 of them have an RMS of 1, and go towards 0
in a flat region.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter
from skimage.color import rgb2lab
from skimage.feature import hog

from refiner_export.records.features import FEATURE_WIDTH

PATCH = 32
_CELLS, _ORIENTATIONS = 4, 12
_CELL = PATCH // _CELLS
# Weaker gradients, in L (0 to 100) per pixel, count as noise. skimage adds 1e-5 to the sum of a block before it divides
# by this sum, so the scale of the picture sets the noise floor.
_NOISE = 1.5
_GRADIENT_SCALE = 1e-5 / (_CELLS * _CELLS * _NOISE)
_LAB_CENTRE, _LAB_SCALE, _CONTRAST_SCALE = np.float32([50, 0, 0]), np.float32([25, 20, 20]), np.float32(10)


def make_canvas(image: Image.Image, grid: int) -> Image.Image:
  """The picture at `grid * PATCH` pixels square, so that a cell of the grid is exactly one patch.

  The canvas is blurred, so that the noise of JPEG and the size of the picture matter less.
  """
  canvas = image.resize((grid * PATCH, grid * PATCH), Image.Resampling.BILINEAR)
  return canvas.filter(ImageFilter.GaussianBlur(2))


def cut_grid(canvas: Image.Image) -> np.ndarray:
  """The cells of a canvas, row by row: uint8 (grid * grid, PATCH, PATCH, 3)."""
  rows, columns = canvas.height // PATCH, canvas.width // PATCH
  cells = np.asarray(canvas).reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2)
  return cells.reshape(rows * columns, PATCH, PATCH, 3)


def cut_region(image: Image.Image, box: np.ndarray) -> np.ndarray:
  """The region `box` of a picture: uint8 (PATCH, PATCH, channels), or (PATCH, PATCH) for a picture of one channel.

  Args:
    image: any size.
    box: (4,) xyxy in [0, 1], with its corners in any order. A side below one pixel is widened to one pixel.
  """
  low = np.clip(np.minimum(box[:2], box[2:]) * image.size, 0, np.subtract(image.size, 1))
  high = np.clip(np.maximum(box[:2], box[2:]) * image.size, low + 1, image.size)
  return np.asarray(image.resize((PATCH, PATCH), Image.Resampling.BILINEAR, box=(*low.tolist(), *high.tolist())))


def describe(patches: Sequence[np.ndarray]) -> np.ndarray:
  """B patches, each uint8 (PATCH, PATCH, 3) RGB -> float32 (B, 256), with the columns that the module describes."""
  count = len(patches)
  if not count:
    return np.zeros((0, FEATURE_WIDTH), np.float32)
  lab = rgb2lab(np.asarray(patches, np.float32) / 255)
  histograms = []
  for lightness in lab[..., 0] * np.float64(_GRADIENT_SCALE):
    histograms.append(hog(lightness, orientations=_ORIENTATIONS, pixels_per_cell=(_CELL, _CELL),
                          cells_per_block=(_CELLS, _CELLS), block_norm="L1-sqrt"))
  gradients = np.stack(histograms) * np.sqrt(len(histograms[0]))
  cells = lab.reshape(count, _CELLS, _CELL, _CELLS, _CELL, 3)
  colour = (cells.mean(axis=(2, 4)) - _LAB_CENTRE) / _LAB_SCALE
  contrast = cells[..., 0].std(axis=(2, 4)) / _CONTRAST_SCALE
  parts = [gradients, colour.reshape(count, -1), contrast.reshape(count, -1)]
  return np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")
