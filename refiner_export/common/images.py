"""Reading pictures as they are found in the wild, and writing the JPEG that a record carries.

A picture becomes 8-bit RGB as a viewer shows it: upright, on white, the first frame of an animation, the
first page of several. Colour profiles are not applied. A file that cannot be read in this way is refused with
a reason, never guessed.
"""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image

LARGEST_PICTURE = 100_000_000  # pixels; a small file that unpacks to more counts as an attack
Image.init()
# The formats of photographs. Pillow's other readers are for documents (EPS runs Ghostscript), or accept half a file
# as a whole file (JPEG 2000). An older Pillow has no AVIF.
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF") if name in Image.OPEN)

# Pillow warns about damaged metadata and about pictures above its own limit. `catch_warnings` would not do: one thread
# would undo it for another.
warnings.filterwarnings("ignore", module=r"PIL\.")

_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}  # EXIF orientation -> what turns such a picture upright


class UnreadableImage(Exception):
  """An example is skipped: its `id`, and the `reason` in words."""

  def __init__(self, id: str, reason: str):
    super().__init__(f"{id}: {reason}")
    self.id, self.reason = id, reason


def open_upright(data: bytes, id: str) -> Image.Image:
  """Decodes a file to RGB with its EXIF orientation applied; transparent parts become white.

  Raises:
    UnreadableImage: the file is not a picture of one of `FORMATS`, is cut short, has no pixels or more than
      `LARGEST_PICTURE`, or its pixels have no known range.
  """
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    pixels = image.width * image.height
    if not 0 < pixels <= LARGEST_PICTURE:
      raise UnreadableImage(id, f"{image.width}x{image.height} pixels, the limit is {LARGEST_PICTURE}")
    image.load()
    return _to_rgb(_turn(image))
  except UnreadableImage:
    raise
  except Image.DecompressionBombError:  # Pillow does not say how large such a picture is
    raise UnreadableImage(id, f"more pixels than the limit of {LARGEST_PICTURE}") from None
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


def _turn(image: Image.Image) -> Image.Image:
  """Turns a picture as its EXIF orientation says.

  `ImageOps.exif_transpose` would not do: it also writes the metadata anew, and fails when any other entry is damaged.
  """
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
  except Exception:  # every viewer shows a picture with unreadable metadata as it lies
    return image
  turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
  return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):  # `convert` would clip 16-bit values to 255 instead of scaling them
    return _grey_of_16_bits(image)
  if image.mode == "F":
    raise ValueError("floating-point pixels have no known range")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
  return image.convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
  values = np.asarray(image)
  if values.min() < 0 or values.max() > 65535:
    raise ValueError("32-bit pixels have no known range")
  grey = np.rint(values / 257).astype(np.uint8)  # 65535 = 257 * 255
  clear = image.info.get("transparency")  # a PNG may say that one grey value is transparent
  if isinstance(clear, int):
    grey[values == clear] = 255
  return Image.fromarray(grey).convert("RGB")
