"""Grey values of more than 8 bits become grey values of 8 bits, by a range that the file states or that is certain."""

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of a TIFF
_MIN_IS_WHITE = 0
_LEAST_CERTAIN = 1 << 15  # a picture of 32-bit integers with larger values has used the range of 16 bits


def is_deep(image: Image.Image) -> bool:
  return image.mode.startswith("I")


class DeepGrey:
  """What turns the grey values of one picture into 8 bits. Its range is decided by the whole picture, not by a strip.

  Raises:
    ValueError: nobody can know which value is white.
  """

  def __init__(self, image: Image.Image):
    tags = image.tag_v2 if image.format == "TIFF" else {}
    self._largest = _range_of(image, tags)
    self._white_is_low = tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE
    clear = image.info.get("transparency")  # a PNG may say that one grey value is transparent
    self._clear = clear if isinstance(clear, int) else None

  def to_rgb(self, image: Image.Image) -> Image.Image:
    """The picture, or a strip of it, as RGB."""
    values = np.asarray(image)
    grey = np.rint(values / (self._largest / 255)).astype(np.uint8)
    if self._white_is_low:
      grey = 255 - grey
    if self._clear is not None:
      grey[values == self._clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _range_of(image: Image.Image, tags) -> int:
  """The value that stands for white, or for black where the lowest value is white."""
  least, most = image.getextrema()
  if image.format != "TIFF":
    largest = 65535  # Pillow scales PGM to 16 bits, and a PNG has no more
  elif image.mode.startswith("I;16"):
    largest = (1 << tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
  elif most <= 255:  # as values of 16 bits they would all be black
    largest = 255
  elif most >= _LEAST_CERTAIN:
    largest = 65535
  else:
    raise ValueError(f"32-bit pixels up to {most} have no known range: store them with 8 or 16 bits")
  if least < 0 or most > largest:
    raise ValueError("32-bit pixels have no known range: store them with 8 or 16 bits")
  return largest
