"""Pictures as they are found: turned upright, of every pixel type, or refused in words."""

import io

import numpy as np
import pytest
from PIL import Image

from refiner_export import images


def file_of(image: Image.Image, kind: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def test_exif_orientation_is_applied():
  upright = Image.new("RGB", (40, 20))
  upright.paste((255, 0, 0), (0, 0, 20, 20))  # the left half is red
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
  data = file_of(upright.rotate(90, expand=True), "PNG", exif=exif)
  assert Image.open(io.BytesIO(data)).size == (20, 40)
  np.testing.assert_array_equal(np.asarray(images.open_upright(data, "x")), np.asarray(upright))


@pytest.mark.parametrize("image, expected", [
    (Image.new("L", (4, 4), 200), (200, 200, 200)),
    (Image.new("RGB", (4, 4), (10, 20, 30)).quantize(), (10, 20, 30)),
    (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
    (Image.new("LA", (4, 4), (0, 255)), (0, 0, 0)),
    (Image.fromarray(np.full((4, 4), 200 * 257, np.uint16)), (200, 200, 200)),
    (Image.new("1", (4, 4), 1), (255, 255, 255))])
def test_pixel_types(image, expected):
  read = images.open_upright(file_of(image, "PNG"), "x")
  assert read.mode == "RGB" and read.getpixel((1, 1)) == expected


def test_cmyk():
  read = images.open_upright(file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "x")
  red, green, blue = read.getpixel((4, 4))
  assert red > 200 and green < 60 and blue < 60


def test_refused(monkeypatch):
  data = file_of(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
  for broken, reason in [(b"", "not a picture"), (b"hello", "not a picture"), (data[:len(data) // 2], "truncated")]:
    with pytest.raises(images.UnreadableImage, match=f"^photo: .*{reason}") as error:
      images.open_upright(broken, "photo")
    assert error.value.id == "photo" and "\n" not in error.value.reason
  monkeypatch.setattr(images, "LARGEST_PICTURE", 1000)
  with pytest.raises(images.UnreadableImage, match="^photo: 64x64 pixels, the limit is 1000$"):
    images.open_upright(data, "photo")


def test_resize_keeps_small_pictures_and_a_pixel_at_least():
  assert images.resize_to(Image.new("RGB", (40, 20)), 64).size == (40, 20)
  assert images.resize_to(Image.new("RGB", (400, 200)), 64).size == (64, 32)
  assert images.resize_to(Image.new("RGB", (1000, 2)), 64).size == (64, 1)
