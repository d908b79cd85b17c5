"""The classical refiner and its descriptor."""

import numpy as np
import pytest
from PIL import Image
from skimage import data

from refiner_export.common.images import open_upright, to_jpeg
from refiner_export.refiners.classical import descriptor
from refiner_export.refiners.base import UprightPicture
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
