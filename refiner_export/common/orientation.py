"""EXIF orientations: how boxes and masks of a stored picture lie in the upright picture.

A camera may store a picture turned or mirrored, and say so in a number from 1 to 8. Annotations may have been made for
the picture as stored. They then have to turn as the picture does.
"""

import numpy as np

Corners = tuple[float, float, float, float]  # xyxy in [0, 1]

# Orientation -> whether rows and columns change places, and which axis is then mirrored: x, y.
_TURNS = {1: (False, False, False), 2: (False, True, False), 3: (False, True, True), 4: (False, False, True),
          5: (True, False, False), 6: (True, True, False), 7: (True, True, True), 8: (True, False, True)}


def turns_sides(orientation: int) -> bool:
  """Whether width and height change places."""
  return _TURNS[orientation][0]


def turn_box(box: Corners, orientation: int) -> Corners:
  """A box of the stored picture -> the same box of the upright picture."""
  left, top, right, bottom = box
  swap, mirror_x, mirror_y = _TURNS[orientation]
  if swap:
    left, top, right, bottom = top, left, bottom, right
  if mirror_x:
    left, right = 1 - right, 1 - left
  if mirror_y:
    top, bottom = 1 - bottom, 1 - top
  return left, top, right, bottom


def turn_mask(mask: np.ndarray, orientation: int) -> np.ndarray:
  """(H, W) of the stored picture -> the same mask of the upright picture."""
  swap, mirror_x, mirror_y = _TURNS[orientation]
  if swap:
    mask = mask.T
  if mirror_x:
    mask = mask[:, ::-1]
  if mirror_y:
    mask = mask[::-1]
  return np.ascontiguousarray(mask)
