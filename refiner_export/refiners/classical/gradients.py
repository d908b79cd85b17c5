"""Histograms of oriented gradients of many patches at once, equal in every bit to `skimage.feature.hog` of each.

`hog` works on one patch, so most of its time goes into calls. Here one step of NumPy works on all patches:
their number is the last axis of every array. The order of all sums is that of `hog`, with the same 32-bit total.
"""

import numpy as np

ORIENTATIONS = 12
_STEP = 180 / ORIENTATIONS  # degrees
_HALF, _NEAR = 1 << 28, 8  # of the 29 bits that a number of 32 bits lacks
_NOISE_FLOOR = 1e-5  # what hog adds to the sum of a block


def histograms(lightness: np.ndarray, cells: int) -> np.ndarray:
  """float64 (side, side, B) -> float64 (B, cells * cells * ORIENTATIONS): the roots of all shares of a patch.

  The order of the columns is cell row, cell column, orientation.
  """
  rows, columns = np.zeros_like(lightness), np.zeros_like(lightness)  # the gradient is zero at the edge of a patch
  np.subtract(lightness[2:], lightness[:-2], out=rows[1:-1])
  np.subtract(lightness[:, 2:], lightness[:, :-2], out=columns[:, 1:-1])
  bins = _orientation(rows, columns)
  # `hypot` takes a third of the time, and the root differs from it in the last bit of 53. A sum of 24 bits shows that
  # only where it lies on the border between two numbers.
  sums, is_certain = _sum_by_orientation(_root(rows, columns), bins, cells)
  if not is_certain:
    sums, _ = _sum_by_orientation(np.hypot(columns, rows), bins, cells)
  return np.sqrt(sums / (sums.sum(axis=1, keepdims=True) + _NOISE_FLOOR))


def _root(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  squares = rows * rows
  squares += columns * columns
  return np.sqrt(squares, out=squares)


def _orientation(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """int32, the bin of each gradient. `ORIENTATIONS` stands for an angle that is rounded up to 180 and has no bin."""
  angles = np.arctan2(rows, columns)
  angles *= 180 / np.pi
  angles -= (angles == 180) * 180.0  # the same direction
  angles += (angles < 0) * 180.0
  bins = (angles * (1 / _STEP)).astype(np.int32)
  bins -= angles < bins * _STEP  # the product may have been rounded up to a whole number
  return bins


def _sum_by_orientation(magnitudes: np.ndarray, bins: np.ndarray, cells: int) -> tuple[np.ndarray, bool]:
  """Adds up the magnitudes of each cell and orientation, pixel after pixel.

  Returns:
    float64 (B, cells * cells * ORIENTATIONS), the mean magnitudes.
    Whether other last bits of the magnitudes would give the same.
  """
  count, width = magnitudes.shape[-1], ORIENTATIONS + 1
  side = len(magnitudes) // cells
  of_cells = (cells, side, cells, side, count)
  first = (np.arange(count * cells * cells, dtype=np.intp) * width).reshape(count, cells, cells).transpose(1, 2, 0)
  places = bins.reshape(of_cells) + first[:, None, :, None]
  magnitudes = magnitudes.reshape(of_cells)
  totals = np.zeros(count * cells * cells * width, np.float32)
  sums = np.empty((side, side, cells, cells, count))
  for row in range(side):
    for column in range(side):
      place, exact = places[:, row, :, column], sums[row, column]
      np.add(totals[place], magnitudes[:, row, :, column], out=exact)
      totals[place] = exact
  means = (totals / np.float32(side * side)).reshape(count, cells * cells, width)[..., :ORIENTATIONS]
  return means.reshape(count, -1).astype(np.float64), not _is_near_border(sums)


def _is_near_border(sums: np.ndarray) -> bool:
  """Whether a sum of 53 bits lies within 8 of its last bits from where rounding to 24 bits changes its direction."""
  lost = sums.view(np.int64) + (_HALF + _NEAR)
  lost &= 2 * _HALF - 1
  return bool((lost <= 2 * _NEAR).any())
