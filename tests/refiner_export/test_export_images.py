"""Pictures as they are found: turned upright, of every pixel type, or refused in words; no guesses and no crashes."""

import functools
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from refiner_export.common import images
from refiner_export.export import pipeline
from refiner_export.export.config import ImageSettings
from refiner_export.common.images import UnreadableImage
from refiner_export.records.record import Record
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.base import SourceExample, SourcePicture

DRAW = np.random.default_rng(0)
RGB = DRAW.integers(0, 256, (6, 9, 3), np.uint8)
ALPHA = DRAW.integers(0, 256, (6, 9, 1), np.uint8)
GREY = RGB[..., 0]
DEEP = DRAW.integers(0, 65536, (6, 9), np.uint16)
DEEP[0, :4] = 0, 65535, 128, 129  # the ends, and what lies below and above the middle of a step
INK = DRAW.integers(0, 256, (6, 9, 4), np.uint8)
SMOOTH = np.asarray(Image.fromarray(RGB).resize((72, 48), Image.Resampling.BICUBIC))  # as JPEG likes it


def file_of(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
  return buffer.getvalue()


def png(depth: int, colour: int, rows: np.ndarray, chunks: dict[bytes, bytes] | None = None) -> bytes:
  """Writes what Pillow cannot: (H, W, C) values of a pixel type, by the format's specification."""
  height, width = rows.shape[:2]
  lines = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rows)
  parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0), **(chunks or {}),
           b"IDAT": zlib.compress(lines), b"IEND": b""}
  framed = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts.items())
  return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def grey(values: np.ndarray) -> np.ndarray:
  return np.repeat(values[..., None], 3, axis=-1)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
  return (colours * (alpha / 255) + 255 * (1 - alpha / 255)).round()


def of_ink(ink: np.ndarray) -> np.ndarray:
  return ((255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255).round()


def animation(kind: str, **options) -> bytes:
  frames = [Image.fromarray(frame) for frame in (RGB, 255 - RGB)]
  return file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)


QUANTISED = Image.fromarray(RGB).quantize(64)  # more colours than pixels: nothing is lost
HOLED = QUANTISED.copy()
HOLED.info["transparency"] = HOLED.getpixel((0, 0))
HOLES = (np.asarray(HOLED) == HOLED.info["transparency"])[..., None]
CMYK = Image.frombytes("CMYK", (9, 6), INK.tobytes())
FLAT_INK = np.broadcast_to(np.array([20, 200, 100, 40], np.uint8), (16, 16, 4))
# name: file, expected pixels, tolerance of them; a tolerance of 1 is for another rounding
READ = {
    "rgb": (file_of(RGB, "PNG"), RGB, 0),
    "bmp": (file_of(RGB, "BMP"), RGB, 0),
    "ppm": (file_of(RGB, "PPM"), RGB, 0),
    "jpeg": (file_of(SMOOTH, "JPEG", quality=100, subsampling=0), SMOOTH, 6),
    "progressive jpeg": (file_of(SMOOTH, "JPEG", quality=100, subsampling=0, progressive=True), SMOOTH, 6),
    "grey": (file_of(GREY, "PNG"), grey(GREY), 0),
    "one bit": (file_of(Image.fromarray(GREY > 99), "PNG"), grey((GREY > 99) * 255), 0),
    "palette": (file_of(QUANTISED, "PNG"), RGB, 0),
    "palette gif": (file_of(QUANTISED, "GIF"), RGB, 0),
    "palette with a transparent colour": (file_of(HOLED, "PNG"), np.where(HOLES, 255, RGB), 0),
    "rgb with alpha": (file_of(np.concatenate([RGB, ALPHA], -1), "PNG"), over_white(RGB, ALPHA), 1),
    "grey with alpha": (file_of(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA[..., 0])]), "PNG"),
                        over_white(grey(GREY), ALPHA), 1),
    "webp with alpha": (file_of(np.concatenate([RGB, np.uint8(255) * (ALPHA > 99)], -1), "WEBP", lossless=True),
                        np.where(ALPHA > 99, RGB, 255), 0),
    "16-bit grey png": (file_of(DEEP, "PNG"), grey((DEEP / 257).round()), 0),
    "16-bit grey tiff": (file_of(DEEP, "TIFF"), grey((DEEP / 257).round()), 0),
    "16-bit values in 32-bit tiff": (file_of(DEEP.astype(np.int32), "TIFF"), grey((DEEP / 257).round()), 0),
    "16-bit grey pgm": (b"P5 9 6 65535\n" + DEEP.astype(">u2").tobytes(), grey((DEEP / 257).round()), 0),
    "12-bit grey pgm": (b"P5 9 6 4095\n" + (DEEP >> 4).astype(">u2").tobytes(),
                        grey(((DEEP >> 4) * (255 / 4095)).round()), 1),
    "16-bit rgb": (png(16, 2, RGB * np.uint16(257)), RGB, 0),
    "16-bit rgb with alpha": (png(16, 6, np.concatenate([RGB, ALPHA], -1) * np.uint16(257)), over_white(RGB, ALPHA), 1),
    "16-bit grey with alpha": (png(16, 4, np.stack([GREY, ALPHA[..., 0]], -1) * np.uint16(257)),
                               over_white(grey(GREY), ALPHA), 1),
    "16-bit grey with a transparent value": (png(16, 0, DEEP[..., None], {b"tRNS": struct.pack(">H", DEEP[2, 2])}),
                                             grey(np.where(DEEP == DEEP[2, 2], 255, (DEEP / 257).round())), 0),
    "cmyk tiff": (file_of(CMYK, "TIFF"), of_ink(INK), 1),
    "cmyk jpeg": (file_of(Image.frombytes("CMYK", (16, 16), FLAT_INK.tobytes()), "JPEG", quality=100),
                  of_ink(FLAT_INK), 4),
    "animated gif": (animation("GIF"), RGB, 0),
    "animated png": (animation("PNG"), RGB, 0),
    "animated webp": (animation("WEBP", lossless=True), RGB, 0),
    "tiff of two pages": (animation("TIFF"), RGB, 0),
    "one pixel": (file_of(RGB[:1, :1], "PNG"), RGB[:1, :1], 0),
    "one pixel high": (file_of(np.tile(RGB[:1], (1, 10_000, 1)), "PNG"), np.tile(RGB[:1], (1, 10_000, 1)), 0),
    "one pixel wide": (file_of(np.tile(RGB[:, :1], (10_000, 1, 1)), "PNG"), np.tile(RGB[:, :1], (10_000, 1, 1)), 0)}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_has_the_right_pixels(name):
  data, expected, tolerance = READ[name]
  image = images.open_upright(data, name)
  assert image.mode == "RGB" and image.size == expected.shape[1::-1]
  assert np.abs(np.asarray(image, np.float64) - expected).max() <= tolerance


# How EXIF defines what a camera has stored, undone: flips and turns of the array.
ORIENTATIONS = {
    0: lambda a: a, 1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90, 9: lambda a: a}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied_once(kind, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = file_of(RGB, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
  np.testing.assert_array_equal(np.asarray(images.open_upright(data, "x")), ORIENTATIONS[orientation](RGB))


TURNED = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # orientation 6, in a TIFF directory


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif, turned", [
    (b"", False), (b"garbage", False), (b"MM\0*\xff\xff\xff\xff", False),
    (b"II*\0\x08\0\0\0\xff\xff" + TURNED[:9], False),
    # The orientation can be read, but beside it is an entry that cannot be written again: text where a number belongs.
    (b"II*\0\x08\0\0\0\x02\0" + b"\x00\x01\x02\0\x04\0\0\0abc\0" + TURNED + b"\0\0\0\0", True)])
def test_corrupt_exif_does_not_lose_the_picture(kind, exif, turned):
  plain = np.asarray(Image.open(io.BytesIO(file_of(SMOOTH, kind))).convert("RGB"))
  read = np.asarray(images.open_upright(file_of(SMOOTH, kind, exif=b"Exif\0\0" + exif), "x"))
  np.testing.assert_array_equal(read, np.rot90(plain, -1) if turned else plain)


def header(width: int, height: int) -> bytes:
  """A whole PNG that claims to be of this size."""
  tiny = png(8, 2, RGB[:1, :1])
  size = b"IHDR" + struct.pack(">II", width, height) + tiny[24:29]
  return tiny[:12] + size + struct.pack(">I", zlib.crc32(size)) + tiny[33:]


REFUSED = {
    "empty": (b"", "not a picture"),
    "text": (b"<html>404</html>", "not a picture"),
    "zeros": (bytes(1000), "not a picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
    "no pixels png": (header(0, 0), "not a picture"),
    "no pixels bmp": (file_of(RGB, "BMP")[:18] + bytes(8) + file_of(RGB, "BMP")[26:], "not a picture"),
    "no pixels ppm": (b"P6 0 0 255\n", "not a picture"),
    "40,000 x 40,000": (header(40_000, 40_000), "more pixels than the limit of 100000000"),
    "12,000 x 12,000": (header(12_000, 12_000), "12000x12000 pixels, the limit is 100000000"),
    "floating point": (file_of(RGB[..., 0].astype(np.float32), "TIFF"), "floating-point pixels have no known range"),
    "32-bit": (file_of(DEEP.astype(np.int32) * 1000, "TIFF"), "32-bit pixels have no known range"),
    "negative": (file_of(DEEP.astype(np.int32) - 9, "TIFF"), "32-bit pixels have no known range"),
    "half a jpeg": (file_of(SMOOTH, "JPEG")[:-200], "truncated")}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
  data, reason = REFUSED[name]
  with pytest.raises(UnreadableImage) as error:
    images.open_upright(data, "photo")
  assert error.value.id == "photo" and reason in error.value.reason and "\n" not in str(error.value)


def test_a_picture_at_the_limit(monkeypatch):
  monkeypatch.setattr(images, "LARGEST_PICTURE", 54)
  assert images.open_upright(READ["rgb"][0], "x").size == (9, 6)
  monkeypatch.setattr(images, "LARGEST_PICTURE", 53)
  with pytest.raises(UnreadableImage, match="^x: 9x6 pixels, the limit is 53$"):
    images.open_upright(READ["rgb"][0], "x")


@pytest.mark.parametrize("name", ["rgb", "bmp", "jpeg", "progressive jpeg", "palette gif", "cmyk tiff", "animated webp",
                                  "animated png", "webp with alpha", "16-bit grey pgm"])
def test_a_file_cut_anywhere_is_refused_or_the_same(name):
  data = READ[name][0]
  whole, refused = np.asarray(images.open_upright(data, name)), 0
  for length in range(0, len(data), 1 + len(data) // 150):
    try:
      image = images.open_upright(data[:length], name)
    except UnreadableImage as error:
      refused += 1
      assert error.reason and "\n" not in error.reason
    else:  # what is missing are later frames or the mark of the end
      np.testing.assert_array_equal(np.asarray(image), whole, err_msg=f"{length} of {len(data)} bytes")
  assert refused > 20


def test_resize_keeps_small_pictures_and_a_pixel_at_least():
  assert images.resize_to(Image.new("RGB", (40, 20)), 64).size == (40, 20)
  assert images.resize_to(Image.new("RGB", (400, 200)), 64).size == (64, 32)
  assert images.resize_to(Image.new("RGB", (1000, 2)), 64).size == (64, 1)


def test_a_window_of_all_of_them_goes_on():
  """What cannot be read is named; the others become records whose pictures decode; the log is JSON, one line each."""
  files = {**{name: data for name, (data, *_) in READ.items()}, **{name: data for name, (data, _) in REFUSED.items()}}
  examples = [SourceExample(name, (SourcePicture(functools.partial(bytes, data)),)) for name, data in files.items()]
  results = pipeline.refine(examples, ClassicalRefiner(grid=2).build(), ImageSettings(max_side=32), "test")
  assert [result.id for result in results] == list(files)
  for result in results:
    assert isinstance(result, UnreadableImage if result.id in REFUSED else Record), result
    if isinstance(result, Record):
      picture = result.picture
      assert Image.open(io.BytesIO(picture.image)).size == (picture.width, picture.height)
      assert max(picture.width, picture.height) <= 32
    else:
      assert "\n" not in json.dumps({"id": result.id, "reason": result.reason})
