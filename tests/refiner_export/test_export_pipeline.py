"""A window of pictures through the whole refiner: what comes out belongs to its picture and to nothing else."""

import io
import threading

import numpy as np
import pytest
from PIL import Image
from tiny_refiner import one_thread, tiny_ram_plus_size, tiny_refiner  # noqa: F401

from refiner_export.export import pipeline
from refiner_export.export.config import ImageSettings
from refiner_export.export.images import UnreadableImage
from refiner_export.records.record import Record
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.refiners.compute import Compute
from refiner_export.sources.base import SourceExample, SourceObject

SIZES = (80, 60), (60, 80), (50, 90), (80, 60), (120, 40), (60, 80), (50, 90)  # width and height
BROKEN = 3  # of the examples, which is no picture
TOLERANCE = 2e-4  # sums are taken in another order


def jpeg(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, "JPEG", quality=95)
  return file.getvalue()


@pytest.fixture(scope="module")
def examples():
  draw = np.random.default_rng(0)
  files = [jpeg(Image.fromarray(draw.integers(0, 255, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC))
           for size in SIZES]
  files.insert(BROKEN, b"no picture")
  return [SourceExample(f"picture {k}", lambda data=data: data, (f"caption {k}",)) for k, data in enumerate(files)]


@pytest.fixture(scope="module")
def models(tmp_path_factory, one_thread, tiny_ram_plus_size):  # noqa: F811
  return tiny_refiner(tmp_path_factory.mktemp("refiner")).build()


@pytest.fixture(scope="module")
def window(examples, models):
  return pipeline.refine(examples, models, ImageSettings(max_side=100), "test")


def test_results_are_in_the_order_of_the_examples(examples, window):
  assert [result.id for result in window] == [example.id for example in examples]
  assert isinstance(window[BROKEN], UnreadableImage) and window[BROKEN].reason == "not a picture"
  records = [result for result in window if isinstance(result, Record)]
  assert [(record.width, record.height) for record in records] == [
      (100, 33) if size == (120, 40) else size for size in SIZES]
  assert [record.captions for record in records] == [example.captions for example in examples if example.id[-1] != "3"]
  assert len({len(record.tags) for record in records}) > 2  # what is compared below differs from picture to picture
  for record in records:
    assert Image.open(io.BytesIO(record.image)).size == (record.width, record.height)
    assert record.detection_features.shape == (30, 256) and record.mask_features.shape == (len(record.tags), 256)
    assert len(record.mask_ious) == len(record.mask_areas) == len(record.tags) and record.mask_rles == ()


def test_together_or_one_at_a_time(examples, models, window):
  for example, together in zip(examples, window):
    (alone,) = pipeline.refine([example], models, ImageSettings(max_side=100), "test")
    if isinstance(together, UnreadableImage):
      assert (alone.id, alone.reason) == (together.id, together.reason)
      continue
    assert (alone.tags, alone.image, alone.id) == (together.tags, together.image, together.id)
    for name in ("boxes", "scores", "detection_features", "detection_boxes", "mask_features", "mask_ious"):
      np.testing.assert_allclose(getattr(together, name), getattr(alone, name), atol=TOLERANCE, err_msg=name)


def test_a_picture_has_the_same_record_wherever_it_stands(examples, models, window):
  backwards = pipeline.refine(examples[::-1], models, ImageSettings(max_side=100), "test")[::-1]
  for there, here in zip(backwards, window):
    assert there.id == here.id
    if isinstance(here, Record):
      assert there.tags == here.tags
      np.testing.assert_allclose(there.detection_features, here.detection_features, atol=TOLERANCE)
      np.testing.assert_allclose(there.mask_features, here.mask_features, atol=TOLERANCE)


def test_no_padding_and_full_batches(models, examples, monkeypatch):
  """Each network sees pictures of one size together, and two at a time where there are two of that size."""
  seen, batches = [], Compute.batches

  def watched(self, arrays, size):
    batched = list(batches(self, arrays, size))
    for positions, pixels in batched:
      assert {arrays[position].shape for position in positions} == {tuple(pixels.shape[1:])}
    seen.append([(len(pixels), *sorted(pixels.shape[1:3])) for _, pixels in batched])
    return iter(batched)

  monkeypatch.setattr(Compute, "batches", watched)
  pipeline.refine(examples, models, ImageSettings(), "test")
  tagger, detector, segmenter = seen
  assert tagger == [(2, 64, 64)] * 3 + [(1, 64, 64)]
  assert set(detector) == {(2, 64, 85), (2, 64, 115), (2, 43, 128)}  # the strip has tags for two captions
  assert set(segmenter) == {(2, 128, 128)}


@pytest.mark.parametrize("examples", [[], [SourceExample("a", lambda: b""), SourceExample("b", lambda: b"text")]])
def test_nothing_to_refine(examples, models):
  results = pipeline.refine(examples, models, ImageSettings(), "test")
  assert [(result.id, result.reason) for result in results] == [(example.id, "not a picture") for example in examples]


def test_several_pictures_are_read_at_once():
  """Each waits until another is being read too: one after the other, this would time out."""
  meeting = threading.Barrier(2, timeout=20)
  data = jpeg(Image.new("RGB", (40, 30)))

  def read():
    meeting.wait()
    return data

  objects = (SourceObject("cat", (0, 0, 0.5, 0.5)),)
  results = pipeline.refine([SourceExample(str(k), read, objects=objects) for k in range(2)], ClassicalRefiner(grid=2),
                            ImageSettings(), "test")
  assert [record.tags for record in results] == [("cat",)] * 2


def test_a_fault_that_is_not_the_picture_s_is_raised(models):
  def read():
    raise RuntimeError("no such luck")

  with pytest.raises(RuntimeError, match="no such luck"):
    pipeline.refine([SourceExample("a", read)], models, ImageSettings(), "test")
