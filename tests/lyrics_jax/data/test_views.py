import io

import numpy as np
import pytest
from PIL import Image

from lyrics_jax.data.pictures import decode
from lyrics_jax.data.views import MEAN_COLOUR, View, sample_view
from refiner_export.common.boxes import to_cxcywh, to_xyxy


def painted(box, height=300, width=400):
  picture = np.zeros((height, width, 3), np.uint8)
  x1, y1, x2, y2 = box
  picture[round(y1 * height):round(y2 * height), round(x1 * width):round(x2 * width)] = 255
  return picture


def found(image):
  ys, xs = np.nonzero(image[:, :, 0] > 127)
  size = image.shape[0]
  return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / size


def test_boxes_follow_the_picture():
  rng, checked = np.random.default_rng(0), 0
  for _ in range(60):
    corner, extent = rng.uniform(0, 0.6, 2), rng.uniform(0.15, 0.4, 2)
    box = np.array([[*corner, *(corner + extent)]], np.float32)
    view = sample_view(rng, (0.3, 1.0), flip=True)
    (moved,), (visible,) = view.boxes_xyxy(box)
    if visible:
      np.testing.assert_allclose(moved, found(view.image(painted(box[0]), 200)), atol=0.016)  # 3 of 200 pixels
      checked += 1
  assert checked > 30


def test_the_default_view_is_the_whole_picture():
  boxes = np.array([[0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5]], np.float32)
  moved, visible = View().boxes_xyxy(boxes)
  np.testing.assert_array_equal(moved, boxes)
  assert visible.all()
  picture = painted((0.25, 0.5, 0.75, 1.0))
  np.testing.assert_allclose(found(View().image(picture, 64)), (0.25, 0.5, 0.75, 1.0), atol=1 / 64)
  np.testing.assert_array_equal(View(flip=True).image(picture, 64), View().image(picture, 64)[:, ::-1])


def test_an_object_left_outside():
  boxes = np.array([[0.4, 0.0, 0.6, 1.0], [0.35, 0, 0.55, 1], [0.7, 0, 1, 1], [0.9, 0.9, 0.9, 0.9]], np.float32)
  moved, visible = View(x1=0.0, x2=0.5).boxes_xyxy(boxes)
  assert visible.tolist() == [True, True, False, False]
  np.testing.assert_allclose(moved[0], [0.8, 0, 1, 1], atol=1e-6)
  assert not View(x1=0.0, x2=0.45).boxes_xyxy(boxes[:1])[1][0]  # a quarter remains
  mirrored, _ = View(x1=0.0, x2=0.5, flip=True).boxes_xyxy(boxes)
  np.testing.assert_allclose(mirrored[0], [0, 0, 0.2, 1], atol=1e-6)


def test_centre_form_agrees_with_corners():
  boxes = np.sort(np.random.default_rng(1).random((20, 2, 2)), axis=1).reshape(-1, 4)
  view = View(0.1, 0.2, 0.8, 0.9, flip=True)
  corners, visible = view.boxes_xyxy(boxes)
  centres, same = view.boxes_cxcywh(to_cxcywh(boxes))
  np.testing.assert_allclose(to_xyxy(centres), corners, atol=1e-6)
  np.testing.assert_array_equal(visible, same)


def test_sampled_views():
  rng = np.random.default_rng(2)
  views = [sample_view(rng, (0.5, 0.9), flip=True) for _ in range(300)]
  areas = np.array([(v.x2 - v.x1) * (v.y2 - v.y1) for v in views])
  aspects = np.array([(v.x2 - v.x1) / (v.y2 - v.y1) for v in views])
  assert 0.5 - 1e-9 <= areas.min() and areas.max() <= 0.9 + 1e-9 and areas.std() > 0.08
  assert 3 / 4 - 1e-9 <= aspects.min() and aspects.max() <= 4 / 3 + 1e-9
  assert all(0 <= v.x1 < v.x2 <= 1 and 0 <= v.y1 < v.y2 <= 1 for v in views)
  assert 0.4 < np.mean([v.flip for v in views]) < 0.6
  assert not any(sample_view(rng, (0.5, 1.0), flip=False).flip for _ in range(50))
  assert sample_view(rng, (1.0, 1.0), flip=False) == View()


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("width, height", [(400, 300), (300, 400), (301, 200)])
def test_boxes_follow_a_fitted_picture(fit, width, height):
  """The white box of the picture is found where `boxes_xyxy` says, whole or cropped, mirrored or not."""
  rng, box = np.random.default_rng(3), np.array([[0.3, 0.4, 0.6, 0.8]], np.float32)
  picture = painted(box[0], height, width)
  for view in (View(), View(flip=True), *[sample_view(rng, (0.5, 1.0), flip=True) for _ in range(20)]):
    view = view.fitted(fit, width, height)
    (moved,), (visible,) = view.boxes_xyxy(box)
    if visible:
      seen = view.image(picture, 200)
      if fit == "pad":  # the margin is no part of the box
        is_margin = np.abs(seen - np.int16(MEAN_COLOUR)).max(-1, keepdims=True) < 30
        seen = np.where(is_margin, 0, seen)
      np.testing.assert_allclose(moved, found(seen), atol=0.016)


@pytest.mark.parametrize("width, height", [(40, 30), (30, 40), (41, 20), (32, 32)])
def test_pad_is_llavas_square(width, height):
  """The picture in the middle of a square of the mean colour, as LLaVA's `expand2square` lays it."""
  picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
  side = max(width, height)
  square = Image.new("RGB", (side, side), MEAN_COLOUR)
  square.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
  view = View().fitted("pad", width, height)
  np.testing.assert_array_equal(view.image(picture, 28), np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC)))
  assert MEAN_COLOUR == tuple(int(255 * mean) for mean in (0.48145466, 0.4578275, 0.40821073))


@pytest.mark.parametrize("width, height", [(40, 30), (30, 40), (41, 20), (32, 32)])
def test_crop_is_the_square_in_the_middle(width, height):
  picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
  side = min(width, height)
  left, top = (width - side) // 2, (height - side) // 2
  square = Image.fromarray(picture[top:top + side, left:left + side])
  seen = View().fitted("crop", width, height).image(picture, 14)
  inner = slice(2, -2)  # at the edges the filter also reads what lies outside of the square, as CLIP's code does
  expected = np.asarray(square.resize((14, 14), Image.Resampling.BICUBIC))
  np.testing.assert_allclose(seen[inner, inner], expected[inner, inner], atol=1)


def test_squash_keeps_the_view():
  view = View(0.1, 0.2, 0.8, 0.9, flip=True)
  assert view.fitted("squash", 400, 300) is view


def test_decode_gives_rgb():
  data = io.BytesIO()
  Image.new("L", (8, 6), 200).save(data, "JPEG")
  picture = decode(data.getvalue())
  assert picture.shape == (6, 8, 3) and picture.dtype == np.uint8
  with pytest.raises(OSError):
    decode(b"no picture")
