"""Reading pictures as they are found in the wild, and writing the JPEG that a record carries."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

LARGEST_PICTURE = 100_000_000  # pixels; a small file that unpacks to more is taken for an attack


class UnreadableImage(Exception):
  """A picture that is skipped: its `id` and, in words, the `reason`."""

  def __init__(self, id: str, reason: str):
    super().__init__(f"{id}: {reason}")
    self.id, self.reason = id, reason


def open_upright(data: bytes, id: str) -> Image.Image:
  """Decodes a file to RGB with its EXIF orientation applied; transparent parts become white.

  Raises:
    UnreadableImage: not a picture, cut short, more than `LARGEST_PICTURE` pixels, or of an unknown pixel type.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
      image = Image.open(io.BytesIO(data))
    if image.width * image.height > LARGEST_PICTURE:
      raise UnreadableImage(id, f"{image.width}x{image.height} pixels, the limit is {LARGEST_PICTURE}")
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))
  except UnreadableImage:
    raise
  except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
    # The address of the buffer in Pillow's message differs from run to run; the log must not.
    reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
    raise UnreadableImage(id, reason or type(error).__name__) from error


def resize_to(image: Image.Image, max_side: int) -> Image.Image:
  """Shrinks a picture so that its longer side is at most `max_side` pixels; smaller pictures stay as they are."""
  scale = max_side / max(image.size)
  if scale >= 1:
    return image
  return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.LANCZOS)


def to_jpeg(image: Image.Image, quality: int = 95) -> bytes:
  """Encodes an RGB picture; the bytes are the same on each run."""
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=quality)
  return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):  # 16-bit grey, whose values `convert` would clip to 255 instead of scaling them
    return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
  if image.mode == "F":
    raise ValueError("floating-point pixels have no known range")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
  return image.convert("RGB")
