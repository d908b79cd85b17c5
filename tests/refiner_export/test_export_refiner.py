"""The classical refiner and its descriptor."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage import data
from skimage.color import rgb2lab
from skimage.feature import hog

from refiner_export.common.images import open_upright, to_jpeg
from refiner_export.refiners.classical import descriptor, gradients
from refiner_export.refiners.base import UprightPicture
from refiner_export.refiners.classical.blur import blur
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.base import SourceObject

GRID = 6


@pytest.fixture(scope="module")
def photo():
  return Image.fromarray(data.chelsea())


def run(refiner, picture):
  tags = refiner.tagger.tag([picture])
  detections = refiner.detector.detect([picture], tags)
  return detections[0], refiner.segmenter.segment([picture], detections)[0].features


def test_descriptor_is_wide_finite_and_deterministic(photo):
  patches = descriptor.cut_grid(descriptor.make_canvas(photo, GRID))
  first = descriptor.describe(patches)
  assert first.shape == (GRID * GRID, 256) and first.dtype == np.float32 and np.isfinite(first).all()
  np.testing.assert_array_equal(first, descriptor.describe(patches))
  np.testing.assert_array_equal(first[7:8], descriptor.describe(patches[7:8]))
  assert 0.3 < np.sqrt(np.square(first).mean()) < 1.5


def test_a_cell_is_the_region_of_its_box(photo):
  canvas = descriptor.make_canvas(photo, GRID)
  cells = descriptor.cut_grid(canvas)
  for row, column in ((0, 0), (2, 3), (GRID - 1, GRID - 1)):
    box = np.array([column, row, column + 1, row + 1]) / GRID
    np.testing.assert_array_equal(descriptor.cut_region(canvas, box), cells[row * GRID + column])


def test_flat_regions_and_thin_boxes_stay_finite(photo):
  flat = descriptor.describe(np.full((1, 32, 32, 3), 128, np.uint8))
  assert np.isfinite(flat).all() and not flat[0, :192].any()
  canvas = descriptor.make_canvas(photo, GRID)
  for box in ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [0, 0, 0, 1]):
    assert descriptor.cut_region(canvas, np.array(box, np.float32)).shape == (32, 32, 3)


def test_compression_matters_less_than_content():
  photo = Image.fromarray(data.astronaut())
  describe = lambda image: descriptor.describe(descriptor.cut_grid(descriptor.make_canvas(image, 16)))
  original, compressed = describe(photo), describe(open_upright(to_jpeg(photo), "x"))
  assert np.abs(original - compressed).mean() < 0.14 * np.abs(original - np.roll(original, 1, axis=0)).mean()


def test_a_photo_without_annotations_has_the_grid(photo):
  found, masks = run(ClassicalRefiner(GRID), UprightPicture(photo))
  assert found.tags == () and found.boxes.shape == (0, 4) and masks.shape == (0, 256)
  centres = (np.arange(GRID) + 0.5) / GRID
  np.testing.assert_allclose(found.row_boxes[:, 0], np.tile(centres, GRID), atol=1e-6)
  np.testing.assert_allclose(found.row_boxes[:, 1], np.repeat(centres, GRID), atol=1e-6)
  np.testing.assert_allclose(found.row_boxes[:, 2:], 1 / GRID, atol=1e-6)


def test_objects_come_first_and_take_the_cells_under_them(photo):
  box = (0.30, 0.30, 0.40, 0.40)  # its centre lies in row 2, column 2
  objects = (SourceObject("cat", box), SourceObject("eye", box))
  found, masks = run(ClassicalRefiner(GRID), UprightPicture(photo, objects))
  assert found.tags == ("cat", "eye") and found.scores.tolist() == [1, 1] and masks.shape == (2, 256)
  assert found.row_features.shape == (GRID * GRID, 256)
  np.testing.assert_allclose(found.row_boxes[:2], [[0.35, 0.35, 0.1, 0.1]] * 2, atol=1e-6)
  kept = np.round(found.row_boxes[2:, :2] * GRID - 0.5).astype(int)  # (column, row)
  missing = {(x, y) for x in range(GRID) for y in range(GRID)} - {tuple(cell) for cell in kept.tolist()}
  assert (2, 2) in missing and len(missing) == 2 and missing - {(2, 2)} < {(1, 2), (2, 1), (3, 2), (2, 3), (1, 1)}
  np.testing.assert_array_equal(masks[0], found.row_features[0])  # without a mask both describe the box


def test_more_objects_than_rows(photo):
  found, masks = run(ClassicalRefiner(grid=2), UprightPicture(photo, (SourceObject("cat", (0, 0, 1, 1)),) * 6))
  assert len(found.tags) == len(masks) == len(found.row_features) == 4


def test_what_lies_outside_the_mask_does_not_count(photo):
  left = np.zeros(photo.size[::-1], bool)
  left[:, :photo.width // 2] = True
  painted = photo.copy()
  painted.paste((0, 255, 0), (photo.width // 2 + 20, 0, photo.width, photo.height))

  def features(mask):
    objects = (SourceObject("cat", (0, 0, 1, 1), mask),)
    return [run(ClassicalRefiner(GRID), UprightPicture(image, objects))[1] for image in (photo, painted)]

  masked, plain = features(lambda: left), features(None)
  np.testing.assert_allclose(masked[0], masked[1], atol=1e-3)
  assert np.abs(plain[0] - plain[1]).mean() > 0.1


def described_one_by_one(patches):
  """What `descriptor.describe` promises, by skimage's functions on one patch at a time."""
  lab = rgb2lab(np.asarray(patches, np.float32) / 255)
  histograms = []
  for lightness in lab[..., 0] * np.float64(1e-5 / (16 * 1.5)):
    histograms.append(hog(lightness, orientations=12, pixels_per_cell=(8, 8), cells_per_block=(4, 4),
                          block_norm="L1-sqrt"))
  cells = lab.reshape(len(patches), 4, 8, 4, 8, 3)
  colour = (cells.mean(axis=(2, 4)) - np.float32([50, 0, 0])) / np.float32([25, 20, 20])
  contrast = cells[..., 0].std(axis=(2, 4)) / np.float32(10)
  gradients = np.stack(histograms) * np.sqrt(192)
  parts = [gradients, colour.reshape(len(patches), -1), contrast.reshape(len(patches), -1)]
  return np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")


@pytest.mark.parametrize("kind", ["photo", "noise", "almost flat", "two values", "flat", "edges"])
def test_all_patches_at_once_have_the_values_of_one_at_a_time(photo, kind):
  """The same in every bit, more patches than are described at one time."""
  generator = np.random.default_rng(0)
  patches = {
      "photo": descriptor.cut_grid(descriptor.make_canvas(photo, 14)),
      "noise": generator.integers(0, 256, (150, 32, 32, 3), np.uint8),
      "almost flat": generator.integers(100, 103, (150, 32, 32, 3), np.uint8),
      "two values": generator.integers(0, 2, (150, 32, 32, 3), np.uint8) * np.uint8(255),
      "flat": np.full((3, 32, 32, 3), 17, np.uint8),
      "edges": np.repeat(np.tri(32, dtype=np.uint8)[None, ..., None], 3, axis=-1) * np.uint8(255)}[kind]
  np.testing.assert_array_equal(descriptor.describe(patches), described_one_by_one(patches))


@pytest.mark.parametrize("seed", range(20))
def test_the_blur_is_that_of_pillow(seed):
  generator = np.random.default_rng(seed)
  low = int(generator.integers(0, 255))
  height, width, high = (*generator.integers(1, 150, 2), generator.integers(low + 1, 257))
  image = Image.fromarray(generator.integers(low, high, (height, width, 3)).astype(np.uint8))
  if seed % 2:  # the sums of a smooth picture often end with a half
    image = image.resize((150, 130), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(blur(np.asarray(image)), np.asarray(image.filter(ImageFilter.GaussianBlur(2))))


def test_a_sum_near_the_border_is_added_up_exactly(photo, monkeypatch):
  """Where the last bit of a magnitude may count, `hypot` decides; here it is asked for every patch."""
  patches = descriptor.cut_grid(descriptor.make_canvas(photo, 4))
  expected = descriptor.describe(patches)
  monkeypatch.setattr(gradients, "_is_near_border", lambda sums: True)
  np.testing.assert_array_equal(descriptor.describe(patches), expected)
  half = np.array([1 + 2**-24])  # between two numbers of 24 bits
  monkeypatch.undo()
  assert gradients._is_near_border(half) and gradients._is_near_border(np.nextafter(half, 2))
  assert not gradients._is_near_border(np.array([1.0])) and not gradients._is_near_border(half + 2**-40)
