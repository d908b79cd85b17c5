"""A directory of schema 1, which `schema_1/` holds as the program of that time wrote it, is read, verified and shown.

It has a record with two objects and masks, one without objects, and one of text alone, whose picture had no bytes.
"""

import pathlib
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from refiner_export.common.settings import UserError
from refiner_export.pages.gallery import render
from refiner_export.records.manifest import Manifest
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import ASSISTANT, USER, Conversation, RecordError, Turn, check
from refiner_export.records.schema import Schema
from refiner_export.records.verify import verify

DIRECTORY = pathlib.Path(__file__).parent / "schema_1"


@pytest.fixture(scope="module")
def directory():
  return RecordDirectory(DIRECTORY)


def rows(count: int, scale: float) -> np.ndarray:
  """The features that were exported: every sixteenth number of a row is not zero."""
  features = np.zeros((count, 256), np.float32)
  features[:, ::16] = np.arange(count * 16).reshape(count, 16) * scale
  return features


def test_a_record_with_objects(directory):
  record = directory[0]
  check(record)
  picture = record.picture
  assert (record.id, record.source, record.captions) == ("two objects", "test", ("a cat and a dog", "two animals"))
  assert record.conversations == (
      Conversation("vqa", (Turn(USER, "How many?"), Turn(ASSISTANT, "two"),
                           Turn(USER, "Where is <box 0.1>?"), Turn(ASSISTANT, "<box 0.0>"))),
      Conversation("rec", (Turn(USER, "the cat"), Turn(ASSISTANT, "<box 0.0>"))))
  assert (picture.tags, picture.width, picture.height, picture.credit) == (("cat", "dog"), 16, 12, "")
  boxes = np.array([[0, 0, 0.5, 0.5], [0.25, 0.5, 0.75, 1]])
  np.testing.assert_array_equal(picture.boxes, boxes)
  np.testing.assert_array_equal(picture.text_boxes, boxes)
  assert picture.scores.tolist() == [0.75, 0.5] and picture.mask_ious.tolist() == [0.875, 0.5]
  assert picture.mask_areas.tolist() == [0.25, 0.25] and len(picture.mask_rles) == 2
  detected = [[0.25, 0.25, 0.5, 0.5], [0.5, 0.75, 0.5, 0.5], [0.5, 0.5, 1, 1]]
  np.testing.assert_allclose(picture.detection_boxes, detected, atol=8e-6)
  for read, given in (picture.detection_features, rows(3, 0.25)), (picture.mask_features, rows(2, -0.5)):
    assert (np.abs(read - given) <= 0.502 / 127 * np.abs(given).max(axis=1, keepdims=True)).all()  # stored as int8


def test_records_without_objects_and_without_a_picture(directory):
  picture = directory[1].picture
  assert (directory[1].id, picture.tags, len(picture.detection_features)) == ("no object", (), 3)
  assert (directory[2].id, directory[2].pictures) == ("text alone", ())
  assert directory[2].conversations == (Conversation("dialogue", (Turn(USER, "Hello"), Turn(ASSISTANT, "Hi"))),)


def test_its_counts(directory):
  assert directory.read_conversation_counts().tolist() == [2, 1, 1]
  assert directory.read_picture_counts().tolist() == [1, 1, 1]  # it does not say which record has no picture
  manifest = directory.manifest
  assert (manifest.schema_version, manifest.records, manifest.conversations, manifest.pictures) == (1, 3, 4, 3)
  assert [shard.records for shard in manifest.shards] == [2, 1] and manifest.storage.feature_relative_rmse > 0


def test_verify_finds_nothing():
  assert list(verify(DIRECTORY)) == []


def test_verify_finds_damage(tmp_path):
  copy = shutil.copytree(DIRECTORY, tmp_path / "copy")
  shard = copy / Manifest.load(copy).shards[0].file
  shard.write_bytes(shard.read_bytes().replace(b"two animals", b"two animalz"))
  assert [problem.split(": ", 1)[1][:6] for problem in verify(copy)] == ["sha256", "record"]


def test_the_gallery_shows_it(directory):
  text = render(directory, limit=3)
  assert text.count('<div class="photo">') == 2 and text.count('class="overlay"') == 1
  assert "cat 0.75" in text and "a cat and a dog" in text and ">cat</span>" in text and "Hello" in text


def test_it_travels_to_a_worker(directory):
  copy = pickle.loads(pickle.dumps(directory))
  assert [copy[k].id for k in range(3)] == ["two objects", "no object", "text alone"]


def test_a_new_photo_as_its_reader_would_get_it(directory):
  """The trainer of such a directory refines a photo in process, with this program's refiner."""
  read = directory.manifest.as_read(directory[0])
  assert read.picture.tags == ("cat", "dog") and read.picture.mask_rles == ()


def test_its_records_are_not_mixed_with_others(directory, tmp_path):
  payload = RecordDirectory(DIRECTORY)._shards[0].read(0)
  manifest = directory.manifest
  with pytest.raises(RecordError, match="^record has schema version 1, its manifest says 2: export again$"):
    Schema(manifest.feature_dtype, manifest.fingerprint, manifest.optional_fields).decode(payload)
  with pytest.raises(RecordError, match="^record was made by refiner c1c007c7aa17, its manifest says x: export again$"):
    type(manifest.schema())(manifest.feature_dtype, "x", manifest.optional_fields).decode(payload)
  with pytest.raises(UserError, match="unknown to this program: update it$"):
    type(manifest.schema())("int8", "x", ("colours",))


def test_tfds_still_describes_it(tmp_path):
  builder = tfds.builder_from_directory(str(DIRECTORY))
  assert builder.info.splits["train"].num_examples == 3
