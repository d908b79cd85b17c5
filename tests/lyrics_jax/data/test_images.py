import io

import numpy as np
import pytest
from PIL import Image

from lyrics_jax.data.images import View, decode, mentions_side, sample_view, to_cxcywh, to_xyxy


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


@pytest.mark.parametrize("text, expected", [
    ("The LEFT cat", True), ("rightmost man", True), ("right-hand side", True), ("左边的猫", True),
    ("a bright day", False), ("a copyleft sign", False), ("a cat", False)])
def test_mentions_side(text, expected):
  assert mentions_side(text) == expected


def test_decode_gives_rgb():
  data = io.BytesIO()
  Image.new("L", (8, 6), 200).save(data, "JPEG")
  picture = decode(data.getvalue())
  assert picture.shape == (6, 8, 3) and picture.dtype == np.uint8
  with pytest.raises(OSError):
    decode(b"no picture")
