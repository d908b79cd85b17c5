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

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image
from skimage.color import xyz_tristimulus_values
from skimage.color.colorconv import xyz_from_rgb

from refiner_export.records.features import FEATURE_WIDTH
from refiner_export.refiners.classical.blur import blur
from refiner_export.refiners.classical.gradients import histograms

PATCH = 32
_CELLS = 4
_TOGETHER = 96  # patches that are described at one time, so that their arrays stay in the cache
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
  return Image.fromarray(blur(np.asarray(canvas)))


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
  described = [np.zeros((0, FEATURE_WIDTH), np.float32)]
  for start in range(0, len(patches), _TOGETHER):
    described.append(_describe(np.asarray(patches[start:start + _TOGETHER])))
  return np.concatenate(described)


def _describe(patches: np.ndarray) -> np.ndarray:
  # From here on the patches are the last axis, so that a step of NumPy works on the same pixel of all patches.
  lab = _to_lab(np.ascontiguousarray(patches.transpose(3, 1, 2, 0)))
  gradients = histograms(lab[0] * np.float64(_GRADIENT_SCALE), _CELLS)
  gradients *= np.sqrt(gradients.shape[1])
  means = _mean_of_cells(lab)
  contrast = _deviation_of_cells(lab[0]) / _CONTRAST_SCALE
  colour = (means.transpose(3, 1, 2, 0) - _LAB_CENTRE) / _LAB_SCALE
  count = len(gradients)
  parts = [gradients, colour.reshape(count, -1), contrast.transpose(2, 0, 1).reshape(count, -1)]
  return np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")


def _to_lab(rgb: np.ndarray) -> np.ndarray:
  """uint8 (3, ...) sRGB -> float32 (3, ...) CIELAB under D65, in every bit as `skimage.color.rgb2lab` gives it.

  Only 256 values have to be made linear.
  """
  linear = np.take(_linear_values(), rgb).reshape(3, -1)
  relative = xyz_from_rgb.astype(np.float32) @ linear
  relative /= xyz_tristimulus_values(illuminant="D65", observer="2", dtype=np.float32)[:, None]
  roots = np.cbrt(relative)
  dark = relative <= 0.008856
  if dark.any():
    roots[dark] = 7.787 * relative[dark] + 16.0 / 116.0
  lab = np.empty_like(roots)
  np.multiply(roots[1], 116.0, out=lab[0])
  lab[0] -= 16.0
  np.subtract(roots[:2], roots[1:], out=lab[1:])
  lab[1] *= 500.0
  lab[2] *= 200.0
  return lab.reshape(rgb.shape)


@functools.cache
def _linear_values() -> np.ndarray:
  """float32 (256,): the linear value of each value of sRGB, as skimage computes it."""
  values = np.arange(256, dtype=np.float32) / 255
  bright = values > 0.04045
  values[bright] = np.power((values[bright] + 0.055) / 1.055, 2.4)
  values[~bright] /= 12.92
  return values


def _cells(planes: np.ndarray) -> np.ndarray:
  """(C, PATCH, PATCH, B) -> (C, cell row, row, cell column, column, B)."""
  return planes.reshape(len(planes), _CELLS, _CELL, _CELLS, _CELL, -1)


def _mean_of_cells(planes: np.ndarray) -> np.ndarray:
  """float32 (C, PATCH, PATCH, B) -> (C, cell row, cell column, B)."""
  cells = _cells(planes)
  total = np.zeros((len(planes), _CELLS, _CELLS, cells.shape[-1]), np.float32)
  for row in range(_CELL):
    for column in range(_CELL):
      total += cells[:, :, row, :, column]
  return total / np.float32(_CELL * _CELL)


def _deviation_of_cells(lightness: np.ndarray) -> np.ndarray:
  """float32 (PATCH, PATCH, B) -> (cell row, cell column, B)."""
  (cells,) = _cells(lightness[None])
  centred = cells - _mean_by_rows(cells)[:, None, :, None]
  return np.sqrt(_mean_by_rows(np.square(centred)))


def _mean_by_rows(cells: np.ndarray) -> np.ndarray:
  """float32 (cell row, row, cell column, column, B) -> (cell row, cell column, B).

  The eight pixels of a row are added in pairs, as NumPy does for an array of one channel. `_mean_of_cells` adds them as
  NumPy does for an array of three.
  """
  pairs = cells[:, :, :, 0::2] + cells[:, :, :, 1::2]
  pairs = pairs[:, :, :, 0::2] + pairs[:, :, :, 1::2]
  rows = pairs[:, :, :, 0] + pairs[:, :, :, 1]
  total = rows[:, 0].copy()
  for row in range(1, _CELL):
    total += rows[:, row]
  return total / np.float32(_CELL * _CELL)
