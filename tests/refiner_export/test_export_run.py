"""A whole export: what it leaves, that it can be stopped anywhere, and what a reader says about damage."""

import dataclasses
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from refiner_export.common.images import UnreadableImage
from refiner_export.common.settings import UserError
from refiner_export.export import pipeline
from refiner_export.export import run
from refiner_export.export.config import ImageSettings, ReadingSettings, RunnerSettings, refiner_from_manifest
from refiner_export.records.manifest import Manifest
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import RecordError
from refiner_export.records.tfrecord import index_path
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture

ANY_UNREAD = RunnerSettings(reading=ReadingSettings(unread=1.0))  # an export goes on without pictures that are missing


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / "copy")


def test_records_and_manifest(finished):
  directory = pickle.loads(pickle.dumps(RecordDirectory(finished)))
  assert [record.id for record in (directory[k] for k in range(len(directory)))] == ["1", "2", "3", "5"]
  assert directory.read_conversation_counts().tolist() == [3, 2, 3, 2]
  manifest = directory.manifest
  assert (manifest.records, manifest.skipped, manifest.conversations) == (4, 1, 10)
  assert [shard.records for shard in manifest.shards] == [2, 1, 1] and manifest.detection_rows == 16
  assert manifest.shards[0].file == "lyrics_records-train.tfrecord-00000-of-00003"
  first = directory[0]
  picture = first.picture
  assert Image.open(io.BytesIO(picture.image)).size == (picture.width, picture.height) == (80, 60)
  assert picture.tags == ("cat", "dog", "dog") and picture.detection_features.shape == (16, 256)
  with pytest.raises(IndexError):
    directory[4]


def test_an_unreadable_picture_is_named_and_counted(finished):
  assert [json.loads(line) for line in (finished / "errors.jsonl").read_text().splitlines()] == [
      {"id": "4", "reason": "not a picture"}]


def test_a_missing_picture_is_skipped(coco, tmp_path, make):
  images = shutil.copytree(coco.images, tmp_path / "images")
  (images / "2.jpg").unlink()
  config = make(dataclasses.replace(coco, images=str(images)), tmp_path / "out", limit=2, runner=ANY_UNREAD)
  manifest = run.export(config)
  assert (manifest.records, manifest.skipped) == (1, 1)
  assert "cannot be read: No such file or directory: " in (tmp_path / "out" / "errors.jsonl").read_text()


def test_nothing_readable_is_an_error(coco, tmp_path, make):
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="^no picture could be read; the first: .*No such file"):
    run.export(make(dataclasses.replace(coco, images=str(tmp_path / "empty")), tmp_path / "out",
                    runner=ANY_UNREAD))


def test_tfds_reads_the_directory(finished):
  builder = tfds.builder_from_directory(str(finished))
  assert builder.info.splits["train"].num_examples == 4
  assert builder.info.splits["train"].shard_lengths == [2, 1, 1]
  assert [path.name for path in builder.info.splits["train"].filepaths] == [
      shard.file for shard in Manifest.load(finished).shards]
  serialized = RecordDirectory(finished)._shards[0].read(0)
  assert builder.info.features.deserialize_example_np(serialized)["id"] == b"1"


@pytest.mark.parametrize("pictures", range(1, 5))
def test_a_stopped_export_shows_only_whole_shards_and_ends_with_the_same_bytes(
    coco, finished, tmp_path, make, monkeypatch, pictures):
  output, refine, seen = tmp_path / "out", pipeline.refine_read, []

  def killed(examples, *arguments):
    if len(seen) == pictures:
      raise KeyboardInterrupt
    seen.extend(examples)
    return refine(examples, *arguments)

  monkeypatch.setattr(pipeline, "refine_read", killed)
  with pytest.raises(KeyboardInterrupt):
    run.export(make(coco, output, batch=1))
  expected = contents(finished)
  visible = {name: data for name, data in contents(output).items() if not name.startswith(".")}
  assert visible == {name: expected[name] for name in visible} and "manifest.json" not in visible
  assert sum(name.startswith("lyrics") and not name.endswith(".index") for name in visible) == pictures // 2
  monkeypatch.setattr(pipeline, "refine_read", refine)
  run.export(make(coco, output))
  assert contents(output) == expected


def test_a_damaged_shard_is_written_again(coco, finished, copy, make):
  shard = next(copy.glob("*00001-of-00003"))
  shard.write_bytes(shard.read_bytes()[:-1])
  run.export(make(coco, copy))
  assert contents(copy) == contents(finished)


def test_a_complete_export_is_left_alone(coco, copy, make, capsys, monkeypatch):
  monkeypatch.setattr(pipeline, "refine_read", None)
  run.export(make(coco, copy))
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"{copy} is complete already"
  assert lines[1].startswith(f"{copy}: 4 records, 1 skipped, 10 conversations, ") and "bytes per record" in lines[1]


def test_another_configuration_is_refused(coco, copy, make):
  with pytest.raises(UserError, match=f"^{copy} was begun with another config.image, config.refiner: "):
    run.export(make(coco, copy, image=ImageSettings(max_side=64), refiner=ClassicalRefiner(grid=3)))


def test_an_edited_source_is_refused(coco, copy, make, tmp_path):
  edited = tmp_path / "captions.json"
  with open(coco.captions) as file:
    edited.write_text(file.read().replace("caption a", "heading a"))
  with pytest.raises(UserError, match="another config.source: "):
    run.export(make(dataclasses.replace(coco, captions=str(edited)), copy))
  # Under the name of before, and as long as before.
  source, output = dataclasses.replace(coco, captions=str(shutil.copy(coco.captions, edited))), tmp_path / "out"
  run.export(make(source, output), run.ShardRange(0, 1))
  edited.write_text(edited.read_text().replace("caption b", "Caption b"))
  with pytest.raises(UserError, match=f"^{output} was begun with another config.source: "):
    run.export(make(source, output))


def test_missing_manifest(tmp_path):
  with pytest.raises(UserError, match=f"^no manifest.json in {tmp_path}: run python -m refiner_export [^\n]*$"):
    RecordDirectory(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda fields: fields | {"schema_version": 99}, "schema version 99, this program reads 1 to 2: "),
    (lambda fields: {}, "not a manifest ('schema_version' is missing): run python -m refiner_export repair "),
    (lambda fields: fields | {"surprise": 1}, "not a manifest ('surprise' is unknown to this program)"),
    (lambda fields: fields | {"shards": 5}, "not a manifest ("),
    (lambda fields: fields | {"shards": [5]}, "not a manifest (expected a JSON object, got int)"),
    (lambda fields: fields | {"records": "4"}, "not a manifest ('records' is '4', expected int)"),
    (lambda fields: fields | {"refiner": {}}, "not a manifest ('refiner' has no name)"),
    (lambda fields: fields | {"feature_dtype": "float8"}, "not a manifest (features.dtype: expected one of "),
    (lambda fields: [fields], "not a manifest (expected a JSON object, got list)")])
def test_bad_manifest(copy, change, message):
  path = copy / "manifest.json"
  fields = json.loads(path.read_text())
  del fields["checksum"]
  path.write_text(json.dumps(change(fields)))
  with pytest.raises(UserError) as error:
    RecordDirectory(copy)
  assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


def test_fingerprint_mismatch(finished):
  made = Manifest.load(finished).fingerprint
  assert len(RecordDirectory(finished, fingerprint=made)) == 4
  with pytest.raises(UserError, match=rf"^{finished}: made by refiner {made} \(classical\), the configuration expects "
                                      rf"abc: export again, or set [^\n]*$"):
    RecordDirectory(finished, fingerprint="abc")


def test_a_record_of_another_refiner_is_named_by_shard_and_position(copy):
  dataclasses.replace(Manifest.load(copy), fingerprint="abc").save(copy)
  with pytest.raises(RecordError, match="00001-of-00003: record 0: record was made by .*, its manifest says abc"):
    RecordDirectory(copy)[2]


def test_a_damaged_directory_is_noticed(copy):
  shard = next(copy.glob("*00002-of-00003"))
  data = shard.read_bytes()
  shard.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
  with pytest.raises(RecordError, match="00002-of-00003: record 0 has a bad checksum"):
    RecordDirectory(copy)[3]
  index_path(shard).unlink()
  with pytest.raises(RecordError, match="00002-of-00003.index: the index is missing"):
    RecordDirectory(copy)


def test_boxes_belong_to_the_upright_picture():
  """The left half of the upright picture is white; the file is stored turned, as a camera does."""
  upright = Image.new("RGB", (120, 60))
  upright.paste((255, 255, 255), (0, 0, 60, 60))
  exif = Image.Exif()
  exif[0x0112] = 6
  file = io.BytesIO()
  upright.rotate(90, expand=True).save(file, "JPEG", exif=exif, quality=95)
  wall = SourceObject("wall", (0.0, 0.0, 0.45, 1.0))
  example = SourceExample("turned", (SourcePicture(file.getvalue, (wall,)),))
  (record,) = pipeline.refine([example], ClassicalRefiner(grid=4), ImageSettings(), "test")
  picture = record.picture
  assert (picture.width, picture.height) == (120, 60)
  stored = Image.open(io.BytesIO(picture.image))
  assert not stored.getexif() and stored.getpixel((20, 30))[0] > 250 and stored.getpixel((100, 30))[0] < 5
  # L is 100 all over the box: (100 - 50) / 25
  np.testing.assert_allclose(picture.mask_features[0, 192:240:3], 2, atol=0.05)


def test_a_new_photo_is_refined_as_the_records_were(finished):
  directory = RecordDirectory(finished)
  refiner = refiner_from_manifest(directory.manifest)
  assert refiner == ClassicalRefiner(grid=4)
  exported = directory[3].picture  # a picture without objects: rows are the same cells
  record = pipeline.refine_photo(exported.image, refiner)
  picture = record.picture
  assert picture.tags == () and record.conversations == () and picture.mask_features.shape == (0, 256)
  np.testing.assert_array_equal(picture.detection_boxes.round(4), exported.detection_boxes.round(4))
  assert np.abs(picture.detection_features - exported.detection_features).mean() < 0.1
  with pytest.raises(UnreadableImage, match="^photo: not a picture$"):
    pipeline.refine_photo(b"text", refiner)


def test_a_refiner_that_changed_is_refused(finished):
  manifest = dataclasses.replace(Manifest.load(finished), fingerprint="old")
  with pytest.raises(UserError, match=r"^records were made by refiner classical version 1 \(old\), this program has "):
    refiner_from_manifest(manifest)
