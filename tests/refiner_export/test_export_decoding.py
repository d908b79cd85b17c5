"""What decoding takes of memory, what a large picture becomes, and which files are stored as they are."""

import io
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from refiner_export.common import images
from refiner_export.common.budget import Budget
from refiner_export.common.images import UnreadableImage
from refiner_export.export import pipeline
from refiner_export.export.config import ImageSettings
from refiner_export.sources.base import SourceExample, SourcePicture

ROOT, HERE = pathlib.Path(__file__).parents[2], pathlib.Path(__file__).parent
DRAW = np.random.default_rng(0)
COARSE = Image.fromarray(DRAW.integers(0, 256, (12, 16, 3), np.uint8))
PIXELS = np.asarray(COARSE.resize((640, 480), Image.Resampling.BICUBIC))


def file_of(image, kind, **options) -> bytes:
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
  return buffer.getvalue()


def stored(data: bytes, max_side: int = 512):
  (picture,) = pipeline.read(SourceExample("a", (SourcePicture(lambda: data),)), ImageSettings(max_side=max_side))
  return picture


# --- memory ---


def run_large(*arguments: int) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, str(HERE / "large_pictures.py"), *map(str, arguments)], cwd=ROOT,
                        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("threads, budget, most", [(1, 1024, 600), (8, 500, 700), (8, 1024, 1200)])
def test_threads_share_the_memory_for_decoding(threads, budget, most):
  """Every picture takes 430 MB, and there are five."""
  result = run_large(threads, budget)
  assert result.returncode == 0, result.stderr
  words = result.stdout.split("records ")[-1].split()
  assert words[:5] == ["0", "1", "2", "3", "4"] and int(words[-1]) < most, result.stdout


@pytest.mark.parametrize("limit", [250, 700])
def test_out_of_memory_stops_with_one_line(limit):
  """One picture does not fit, or two at a time do not, although the budget allows eight."""
  result = run_large(8, 100_000, limit)
  assert result.returncode == 2, result.stdout + result.stderr
  assert "out of memory: lower config.runner.reading.megabytes" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")])
def test_out_of_memory_is_never_a_fault_of_the_picture(monkeypatch, error):
  def fail(*_):
    raise error

  monkeypatch.setattr(images, "_decode", fail)
  with pytest.raises(MemoryError):
    images.open_upright(file_of(PIXELS, "PNG"), "a")


@pytest.mark.parametrize("is_short", [False, True])
def test_a_decoder_that_calls_it_a_broken_file(monkeypatch, is_short):
  """A decoder may say nothing else when it gets no memory; so whether there is memory is asked then."""
  def ask(*_):
    if is_short:
      raise OSError(12, "Cannot allocate memory")
    return open("/dev/null")

  monkeypatch.setattr(images.mmap, "mmap", ask)
  with pytest.raises(MemoryError if is_short else UnreadableImage):
    images.open_upright(file_of(PIXELS, "JPEG")[:-5000], "a")


def test_a_budget_is_never_exceeded_and_large_wishes_come_alone():
  budget, holding, most, lock = Budget(100), 0, 0, threading.Lock()

  def work(size):
    nonlocal holding, most
    with budget.take(size):
      with lock:
        holding += min(size, 100)
        most = max(most, holding)
      threading.Event().wait(0.002)
      with lock:
        holding -= min(size, 100)

  threads = [threading.Thread(target=work, args=(size,)) for size in (10, 60, 500, 100, 0, 40, 70) * 6]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  assert most == 100 and holding == 0


# --- large pictures ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_picture_looks_as_if_it_had_been_decoded_whole(monkeypatch, kind, mode, orientation):
  if (kind, mode) in (("JPEG", "RGBA"), ("GIF", "RGBA"), ("BMP", "RGBA")):
    pytest.skip("no such files")
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {} if kind in ("BMP", "GIF") else {"exif": exif}
  data = file_of(Image.fromarray(PIXELS).convert(mode), kind, **options)
  whole = stored(data, max_side=64)
  monkeypatch.setattr(images, "LARGE", 10_000)
  monkeypatch.setattr(images, "_STRIP", 7_000)
  reduced = stored(data, max_side=64)
  assert reduced.image.size == whole.image.size
  assert np.abs(np.asarray(reduced.image, float) - np.asarray(whole.image, float)).mean() < 1.5
  upright = images.open_turned(data, "a", 64)
  turned = orientation == 6 and kind not in ("BMP", "GIF")
  assert upright.size == ((480, 640) if turned else (640, 480)) and max(upright.image.size) < 320


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "I;16"])
def test_strips_change_no_pixel(monkeypatch, mode):
  deep = Image.fromarray(PIXELS.astype(np.uint16)[..., 0] * 257)
  image = deep if mode == "I;16" else Image.fromarray(PIXELS).convert(mode)
  data = file_of(image, "PNG")
  whole = images.open_upright(data, "a")
  monkeypatch.setattr(images, "_STRIP", 5_000)
  np.testing.assert_array_equal(np.asarray(images.open_upright(data, "a")), np.asarray(whole))


# --- grey values of more than eight bits ---


def tiff(values: np.ndarray, white_is_low: bool = False) -> bytes:
  tags = ImageFileDirectory_v2()
  tags[262] = 0 if white_is_low else 1
  return file_of(values, "TIFF", tiffinfo=tags)


DEEP = DRAW.integers(0, 65536, (6, 9), np.uint16)
DEEP[0, :2] = 0, 65535
GREYS = {
    "16 bits": (tiff(DEEP), DEEP / 257),
    "16 bits, white is low": (tiff(DEEP, True), 255 - np.rint(DEEP / 257)),
    "8 bits, white is low": (tiff((DEEP >> 8).astype(np.uint8), True), DEEP >> 8),  # Pillow turns them over in writing
    "32 bits with 8 bits in use": (tiff((DEEP >> 8).astype(np.int32)), DEEP >> 8),
    "32 bits, nearly black": (tiff((DEEP % 3).astype(np.int32)), DEEP % 3),
    "32 bits with 16 bits in use": (tiff(DEEP.astype(np.int32)), DEEP / 257),
    "32 bits with 12 bits in use": (tiff((DEEP >> 4).astype(np.int32)), "32-bit pixels up to 4095 have no known range"),
    "32 bits in use": (tiff(DEEP.astype(np.int32) << 10), "32-bit pixels have no known range"),
    "negative": (tiff(DEEP.astype(np.int32) - 1), "32-bit pixels have no known range")}


@pytest.mark.parametrize("strip", [1 << 20, 20])
@pytest.mark.parametrize("name", GREYS)
def test_deep_greys(monkeypatch, name, strip):
  monkeypatch.setattr(images, "_STRIP", strip)
  data, expected = GREYS[name]
  if isinstance(expected, str):
    with pytest.raises(UnreadableImage, match=expected):
      images.open_upright(data, "a")
    return
  read = np.asarray(images.open_upright(data, "a"))
  np.testing.assert_array_equal(read, np.repeat(np.rint(expected)[..., None], 3, axis=-1))


# --- formats that are not read ---


@pytest.mark.parametrize("data, name", [
    (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC"), (b"\0\0\0\x1cftypmif1" + bytes(99), "HEIF"),
    (file_of(PIXELS, "JPEG2000"), "JPEG 2000"), (file_of(PIXELS, "JPEG2000", no_jp2=True), "JPEG 2000"),
    (file_of(PIXELS[:32, :32], "ICO"), "ICO"), (b"8BPS\0\1" + bytes(99), "PSD"), (file_of(PIXELS, "PDF"), "PDF"),
    (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(9), "JPEG XL"), (b"\xff\x0a" + bytes(99), "JPEG XL"),
    (bytes(128) + b"DICM" + bytes(9), "DICOM"), (b"%!PS-Adobe-3.0", "PostScript"), (file_of(PIXELS, "DDS"), "DDS")])
def test_a_known_format_is_named_with_the_remedy(data, name):
  with pytest.raises(UnreadableImage) as refused:
    images.open_upright(data, "a")
  assert refused.value.reason == f"not a picture of a kind that is read, but {name}: convert it to PNG or JPEG"


# --- files that are stored as they are ---


def turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


KEPT = {
    "jpeg": file_of(PIXELS, "JPEG", quality=70), "progressive": file_of(PIXELS, "JPEG", progressive=True),
    "upright": file_of(PIXELS, "JPEG", exif=turned(1)), "large enough": file_of(PIXELS[:32, :32], "JPEG")}
CHANGED = {
    "png": file_of(PIXELS, "PNG"), "turned": file_of(PIXELS, "JPEG", exif=turned(6)),
    "nonsense": file_of(PIXELS, "JPEG", exif=turned(9)), "grey": file_of(PIXELS[..., 0], "JPEG"),
    "ink": file_of(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"),
    "something behind it": file_of(PIXELS, "JPEG") + b"a second picture",
    "something inside": file_of(PIXELS[:16, :16], "JPEG", comment=bytes(60_000)),
    "too large": file_of(np.tile(PIXELS, (2, 2, 1)), "JPEG")}


@pytest.mark.parametrize("name", [*KEPT, *CHANGED])
def test_a_jpeg_that_needs_no_change_is_kept(name):
  data = KEPT.get(name) or CHANGED[name]
  picture = stored(data, max_side=640)
  assert (picture.jpeg == data) == (name in KEPT)
  shown = np.asarray(Image.open(io.BytesIO(picture.jpeg)).convert("RGB"), float)
  assert np.abs(shown - np.asarray(picture.image, float)).mean() < 3


def test_what_is_kept_has_the_pixels_that_the_refiner_sees():
  picture = stored(KEPT["jpeg"], max_side=640)
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture.jpeg))), np.asarray(picture.image))
