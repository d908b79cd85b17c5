"""Masks as COCO's compressed run-length codes, as pycocotools writes them.

Runs of zeros and ones take turns along the columns. The length of a run is written in digits of five bits,
the lowest digit first. A digit is a character from `0` on; its sixth bit says that another digit follows.
From the fourth number on, a number is the difference to the number two places before. Source: `maskApi.c` of
pycocotools. The decoder there is not used because it fills what a damaged code leaves out with whatever lies
in memory.
"""

import numpy as np

_LONGEST = 60  # bits of a number

def decode_rle(rle: bytes, height: int, width: int) -> np.ndarray:
  """The compressed `counts` of a mask -> bool (height, width). Raises `ValueError` for another number of pixels."""
  lengths = _lengths(rle)
  if min(lengths, default=0) < 0 or sum(lengths) != height * width:
    raise ValueError(f"not a mask of {height} rows and {width} columns")
  return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def _lengths(rle: bytes) -> list[int]:
  lengths, number, shift = [], 0, 0
  for digit in np.frombuffer(rle, np.uint8).astype(int) - 48:
    number |= int(digit & 0x1F) << shift
    shift += 5
    if digit & 0x20:
      if shift > _LONGEST:
        raise ValueError("not a run-length code")
      continue
    if digit & 0x10:  # the sign bit
      number -= 1 << shift
    lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
    number, shift = 0, 0
  return lengths
