"""A window of pictures through the whole refiner: what comes out belongs to its picture and to nothing else."""

import functools
import io
import pathlib
import threading

import numpy as np
import pytest
from PIL import Image
from tiny_refiner import one_thread, tiny_ram_plus_size, tiny_refiner  # noqa: F401

from refiner_export.export import pipeline
from refiner_export.export.config import ImageSettings
from refiner_export.common.images import UnreadableImage
from refiner_export.records.record import Picture, Record, check
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.refiners.compute import Compute
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture, ask

SIZES = (80, 60), (60, 80), (50, 90), (80, 60), (120, 40), (60, 80), (50, 90)  # width and height
BROKEN = 3  # of the examples, which is no picture
TOLERANCE = 2e-4  # sums are taken in another order


def jpeg(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, "JPEG", quality=95)
  return file.getvalue()


def source_picture(data: bytes, **fields) -> SourcePicture:
  return SourcePicture(functools.partial(bytes, data), **fields)


@pytest.fixture(scope="module")
def examples():
  draw = np.random.default_rng(0)
  files = [jpeg(Image.fromarray(draw.integers(0, 255, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC))
           for size in SIZES]
  files.insert(BROKEN, b"no picture")
  return [SourceExample(f"picture {k}", (source_picture(data),), (f"caption {k}",)) for k, data in enumerate(files)]


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
  pictures = [record.picture for record in records]
  assert [(picture.width, picture.height) for picture in pictures] == [
      (100, 33) if size == (120, 40) else size for size in SIZES]
  assert [record.captions for record in records] == [example.captions for example in examples if example.id[-1] != "3"]
  assert len({len(picture.tags) for picture in pictures}) > 2  # what is compared below differs from picture to picture
  for picture in pictures:
    assert Image.open(io.BytesIO(picture.image)).size == (picture.width, picture.height)
    assert picture.detection_features.shape == (30, 256) and picture.mask_features.shape == (len(picture.tags), 256)
    assert len(picture.mask_ious) == len(picture.mask_areas) == len(picture.tags) and picture.mask_rles == ()


def test_together_or_one_at_a_time(examples, models, window):
  for example, together in zip(examples, window):
    (alone,) = pipeline.refine([example], models, ImageSettings(max_side=100), "test")
    if isinstance(together, UnreadableImage):
      assert (alone.id, alone.reason) == (together.id, together.reason)
      continue
    assert alone.id == together.id
    assert_close(alone.picture, together.picture)


def assert_close(one: Picture, other: Picture) -> None:
  assert (one.tags, one.image) == (other.tags, other.image)
  for name in ("boxes", "scores", "detection_features", "detection_boxes", "mask_features", "mask_ious"):
    np.testing.assert_allclose(getattr(other, name), getattr(one, name), atol=TOLERANCE, err_msg=name)


def test_several_pictures_none_and_one_that_is_broken(examples, models, window):
  """Each record has its example's pictures, in order, as if each picture had been alone."""
  (one,), (two,), (three,) = (examples[k].pictures for k in (0, 2, 6))
  broken = examples[BROKEN].pictures[0]
  talk = (ask("vqa", "<image 0> or <image 1>?", "<box 1.0>"),)
  box = (0.25, 0.5, 0.75, 1.0)
  given = [
      SourceExample("two", (one, source_picture(two.read(), text_boxes=(box,), credit="Photo: Ann")), (), talk),
      SourceExample("none", (), ("a caption",), (ask("dialogue", "hello", "hi"),)),
      SourceExample("broken", (three, broken), ("not exported",)),
      SourceExample("one", (three,))]
  first, text, skipped, last = pipeline.refine(given, models, ImageSettings(max_side=100), "test")
  assert (skipped.id, skipped.reason) == ("broken", "picture 1: not a picture")
  assert (text.pictures, text.captions, text.conversations) == ((), ("a caption",), given[1].conversations)
  assert first.conversations == talk and [len(record.pictures) for record in (first, last)] == [2, 1]
  for picture, expected in zip((*first.pictures, *last.pictures), (0, 2, 6), strict=True):
    assert_close(picture, window[expected].picture)
  assert [picture.credit for picture in first.pictures] == ["", "Photo: Ann"]
  assert first.pictures[1].text_boxes.tolist() == [list(box)] and first.pictures[0].text_boxes.shape == (0, 4)
  for record in (first, text, last):
    check(record)


def test_a_missing_file_skips_its_example_alone(examples, models, window):
  missing = pathlib.Path("/nowhere/photo.jpg")
  given = [SourceExample("a", (examples[0].pictures[0], SourcePicture(missing.read_bytes))), examples[0]]
  skipped, record = pipeline.refine(given, models, ImageSettings(max_side=100), "test")
  assert skipped.reason == "picture 1: cannot be read: No such file or directory: /nowhere/photo.jpg"
  assert_close(record.picture, window[0].picture)


def test_a_photo_of_a_person(examples, models, window):
  record = pipeline.refine_photo(examples[0].pictures[0].read(), models, ImageSettings(max_side=100))
  assert (record.id, record.captions, record.conversations) == ("photo", (), ())
  assert_close(record.picture, window[0].picture)
  with pytest.raises(UnreadableImage, match="^photo: not a picture$"):
    pipeline.refine_photo(b"no picture", models)


def test_a_picture_has_the_same_record_wherever_it_stands(examples, models, window):
  backwards = pipeline.refine(examples[::-1], models, ImageSettings(max_side=100), "test")[::-1]
  for there, here in zip(backwards, window):
    assert there.id == here.id
    if isinstance(here, Record):
      assert_close(there.picture, here.picture)


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


@pytest.mark.parametrize("examples", [
    [], [SourceExample("a", (source_picture(b""),)), SourceExample("b", (source_picture(b"text"),))]])
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
  examples = [SourceExample(str(k), (SourcePicture(read, objects),)) for k in range(2)]
  results = pipeline.refine(examples, ClassicalRefiner(grid=2).build(), ImageSettings(), "test")
  assert [record.picture.tags for record in results] == [("cat",)] * 2


def test_a_fault_that_is_not_the_picture_s_is_raised(models):
  def read():
    raise RuntimeError("no such luck")

  with pytest.raises(RuntimeError, match="no such luck"):
    pipeline.refine([SourceExample("a", (SourcePicture(read),))], models, ImageSettings(), "test")
