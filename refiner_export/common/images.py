"""Reading pictures as they are found in the wild, and writing the JPEG that a record carries.

A picture becomes 8-bit RGB as a viewer shows it: upright, on white, the first frame of an animation, the
first page of several. Colour profiles are not applied. A file that cannot be read in this way is refused with
a reason, never guessed.
"""

import contextlib
import dataclasses
import io
import math
import mmap
import warnings
from collections.abc import Iterator

from PIL import ExifTags, Image

from refiner_export.common import other_formats
from refiner_export.common.budget import Budget
from refiner_export.common.deep_grey import DeepGrey, is_deep

LARGEST_PICTURE = 100_000_000  # pixels; a small file that unpacks to more counts as an attack
LARGE = 16_000_000  # pixels; a larger picture that will be shrunk anyway is made smaller while it is decoded
DECODING = Budget(1 << 30)  # bytes for what all threads of the process decode at one time
Image.init()
# Pillow takes memory in blocks. The C library gives blocks above 32 MB back to the system at once. It keeps smaller
# blocks for the thread that had them, and eight threads would then hold eight large pictures.
Image.core.set_block_size(64 << 20)
# The formats of photographs. Pillow's other readers are for documents (EPS runs Ghostscript), or accept half a file
# as a whole file (JPEG 2000). An older Pillow has no AVIF.
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF") if name in Image.OPEN)

# Pillow warns about damaged metadata and about pictures above its own limit. `catch_warnings` would not do: one thread
# would undo it for another.
warnings.filterwarnings("ignore", module=r"PIL\.")

_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}  # EXIF orientation -> what turns such a picture upright

_STRIP = 1 << 20  # pixels that are converted at one time
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # of a pixel; 4 in all others
_DECODER_BYTES = {"WEBP": 8, "AVIF": 12, "TIFF": 4, "GIF": 4}  # of a pixel, in buffers of the decoder
_END_OF_JPEG = b"\xff\xd9"


class UnreadableImage(Exception):
  """An example is skipped: its `id`, and the `reason` in words.

  `is_unread` says that a file could not be read, which may pass; otherwise the reason is in the picture itself.
  """

  def __init__(self, id: str, reason: str, is_unread: bool = False):
    super().__init__(f"{id}: {reason}")
    self.id, self.reason, self.is_unread = id, reason, is_unread


@dataclasses.dataclass(frozen=True)
class Upright:
  """A picture as a viewer shows it.

  Attributes:
    image: RGB; transparent parts are white.
    size: width and height of the whole upright picture, in pixels of the file.
    orientation: what EXIF said before the picture was turned, 1 to 8; 1 for a picture that nobody turned.
    is_plain_jpeg: whether the file is a JPEG that shows this picture as it is, so that nobody has to write it anew.
  """
  image: Image.Image
  size: tuple[int, int]
  orientation: int
  is_plain_jpeg: bool = False


def open_upright(data: bytes, id: str) -> Image.Image:
  """The image of `open_turned`, for who needs no more."""
  return open_turned(data, id).image


def open_turned(data: bytes, id: str, max_side: int | None = None) -> Upright:
  """Decodes a file to RGB with its EXIF orientation applied.

  The memory that decoding takes comes out of `DECODING`, which all threads share.

  Args:
    data: the file.
    id: the example's, for errors.
    max_side: who will shrink the picture to this longer side says so here: a picture of more than `LARGE` pixels is
      then made smaller while it is decoded, though never smaller than twice this side.

  Raises:
    UnreadableImage: the file is not a picture of one of `FORMATS`, is cut short, has no pixels or more than
      `LARGEST_PICTURE`, or its pixels have no known range.
    MemoryError: there is not enough memory. This says nothing about the picture.
  """
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    pixels = image.width * image.height
    if not 0 < pixels <= LARGEST_PICTURE:
      raise UnreadableImage(id, f"{image.width}x{image.height} pixels, the limit is {LARGEST_PICTURE}")
    return _decode(image, data, max_side if max_side and pixels > LARGE else None)
  except (UnreadableImage, MemoryError):
    raise
  except Image.DecompressionBombError:  # Pillow does not say how large such a picture is
    raise UnreadableImage(id, f"more pixels than the limit of {LARGEST_PICTURE}") from None
  except Image.UnidentifiedImageError as error:  # its message holds an address, which differs from run to run
    raise UnreadableImage(id, other_formats.refusal(data)) from error
  except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
    reason = " ".join(str(error).split())
    if reason.startswith("out of memory"):  # Pillow's decoders say so in an OSError
      raise MemoryError(reason) from error
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


def _orientation(image: Image.Image) -> int:
  """What EXIF says, 1 to 8; 1 where it says nothing or nonsense.

  `ImageOps.exif_transpose` would not do: it also writes the metadata anew, and fails when any other entry is damaged.
  """
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
  except Exception:  # every viewer shows a picture with unreadable metadata as it lies
    return 1
  return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def _tiff_orientation(image: Image.Image) -> int:
  """The orientation of a TIFF, which Pillow turns by itself while it loads the pixels; 0 for other formats."""
  if image.format != "TIFF":
    return 0
  return _orientation(image)


def _decode(image: Image.Image, data: bytes, max_side: int | None) -> Upright:
  """The picture of an opened file. With a `max_side`, it is reduced while it is decoded."""
  as_tiff, size, factor = _tiff_orientation(image), image.size, 1
  if max_side:
    scale = min(1.0, 2 * max_side / max(size))
    image.draft(image.mode, (max(1, int(size[0] * scale)), max(1, int(size[1] * scale))))  # only a JPEG can do it
    factor = max(1, max(image.size) // (2 * max_side))
  needed = _needed(image, size, factor)
  with DECODING.take(needed), _telling_memory_from_damage(needed):
    image.load()
    if as_tiff:
      size = image.size
    orientation = as_tiff or _orientation(image)
    is_plain = _is_plain_jpeg(image, data, size)
    rgb = _in_strips(image, factor)
    if not as_tiff and orientation in _UPRIGHT:
      rgb = rgb.transpose(_UPRIGHT[orientation])
      size = size if orientation < 5 else size[::-1]
    image.close()  # its pixels are gone before another thread may take their place
  return Upright(rgb, size, orientation, is_plain)


@contextlib.contextmanager
def _telling_memory_from_damage(needed: int) -> Iterator[None]:
  """Raises `MemoryError` for an error of the block if so many bytes are not there: decoders call both a broken file."""
  try:
    yield
  except Exception as error:
    try:
      mmap.mmap(-1, needed).close()
    except OSError:
      raise MemoryError(str(error)) from error
    raise


def _needed(image: Image.Image, size: tuple[int, int], factor: int) -> int:
  """About how many bytes decoding and converting take at most. `size` is that of the file."""
  in_decoder = _DECODER_BYTES.get(image.format, 0)
  if image.info.get("progressive"):
    in_decoder = 6  # libjpeg keeps all coefficients, as 16 bits each, even of a picture that it makes smaller
  result = 8 if factor == 1 else 0  # RGB takes four bytes, and turning makes a second picture
  of_picture = math.prod(image.size) * (_MODE_BYTES.get(image.mode, 4) + result)
  return of_picture + math.prod(size) * in_decoder + 32 * _STRIP


def _in_strips(image: Image.Image, factor: int) -> Image.Image:
  """The picture as RGB, smaller by a whole factor. Strip by strip, because converting takes several copies."""
  width, height = image.size
  to_rgb = DeepGrey(image).to_rgb if is_deep(image) else _to_rgb
  if width * height <= _STRIP and factor == 1:
    return to_rgb(image)
  rows = max(1, _STRIP // (width * factor)) * factor
  result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
  for top in range(0, height, rows):
    strip = to_rgb(image.crop((0, top, width, min(top + rows, height))))
    result.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
  return result


def _is_plain_jpeg(image: Image.Image, data: bytes, size: tuple[int, int]) -> bool:
  """Whether every viewer shows the picture of the file as this program does, and the file holds little else.

  A larger file than its pixels holds other things: previews, second pictures, hidden data.
  """
  if image.format != "JPEG" or image.mode != "RGB" or not data.endswith(_END_OF_JPEG):
    return False
  if len(data) > 3 * math.prod(size):
    return False
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
  except Exception:  # viewers differ in what they make of damaged metadata
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode == "F":
    raise ValueError("floating-point pixels have no known range")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
  return image.convert("RGB")
