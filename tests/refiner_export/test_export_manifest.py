"""What the manifest states follows from the records; one of another program is refused in one line."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from refiner_export.records.features import FeatureSums
from refiner_export.records.manifest import Manifest
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import RecordError
from refiner_export.common.settings import UserError
from refiner_export.records.shard_files import ShardInfo


def test_bytes_are_those_of_the_files(finished):
  storage = json.loads((finished / "manifest.json").read_text())["storage"]
  directory = RecordDirectory(finished)
  assert storage["bytes_per_record"] == sum(path.stat().st_size for path in finished.glob("*-of-00003")) / 4
  # bfloat16 rows of both kinds, and the detector rows' boxes as four 16-bit numbers
  sizes = [len(record.detection_features) * (512 + 8) + len(record.mask_features) * 512
           for record in (directory[k].picture for k in range(4))]
  assert storage["feature_bytes_per_record"] == sum(sizes) / 4


def test_saved_and_loaded(finished, tmp_path):
  manifest = dataclasses.replace(Manifest.load(finished), optional_fields=("mask_areas",), format="array_record")
  manifest.save(tmp_path)
  assert Manifest.load(tmp_path) == manifest
  assert manifest.schema().optional_fields == ("mask_areas",)
  assert json.loads((tmp_path / "manifest.json").read_text())["storage"] == dataclasses.asdict(manifest.storage)


def test_a_manifest_from_before_there_were_formats(finished, tmp_path):
  """It is of schema 1, has no fields for them, and its shards have no sums."""
  fields = json.loads((finished / "manifest.json").read_text())
  new = ("format", "optional_fields", "storage", "pictures", "files", "checksum")
  old = {name: value for name, value in fields.items() if name not in new} | {"schema_version": 1}
  names = ("file", "records", "conversations", "bytes", "sha256")
  old["shards"] = [{name: shard[name] for name in names} for shard in fields["shards"]]
  shutil.copytree(finished, tmp_path / "copy")
  (tmp_path / "copy" / "manifest.json").write_text(json.dumps(old))
  manifest = Manifest.load(tmp_path / "copy")
  assert (manifest.format, manifest.optional_fields, manifest.pictures) == ("tfrecord", (), 4)
  assert (manifest.storage.feature_relative_rmse, manifest.storage.feature_mean_cosine) == (0, 1)


@pytest.mark.parametrize("change, message", [
    ({"schema_version": 0}, "schema version 0, this program reads 1 to 2: export again, or update the program"),
    ({"schema_version": 3, "anything": "new"},
     "schema version 3, this program reads 1 to 2: export again, or update the program"),
    ({"format": "parquet"}, "shards of format 'parquet', which this program does not know: update it")])
def test_another_program_s_manifest(finished, tmp_path, change, message):
  fields = json.loads((finished / "manifest.json").read_text())
  del fields["checksum"]
  (tmp_path / "manifest.json").write_text(json.dumps(fields | change))
  with pytest.raises(UserError) as error:
    RecordDirectory(tmp_path)
  assert str(error.value) == f"{tmp_path}/manifest.json: {message}"


def test_sums_of_many_parts_do_not_depend_on_their_order():
  draw = np.random.default_rng(0)
  parts = [FeatureSums(int(draw.integers(100)), int(draw.integers(9)), *(10.0 ** draw.uniform(-9, 9, 3)).tolist())
           for _ in range(500)]
  total = FeatureSums.total(parts)
  assert total == FeatureSums.total([parts[k] for k in draw.permutation(500)])
  for name in "squared_values", "squared_errors", "cosines":
    assert getattr(total, name) == math.fsum(getattr(part, name) for part in parts)
  assert FeatureSums.total([]) == FeatureSums()


def test_the_error_of_a_directory_is_that_of_all_rows(finished):
  """Of shards of unequal size, it is no mean of their errors."""
  given = np.random.default_rng(1).normal(size=(30, 256)) * np.linspace(0.1, 3, 30)[:, None]
  read = given + np.random.default_rng(2).normal(size=given.shape) * 0.1
  shards = []
  for rows in slice(0, 3), slice(3, 5), slice(5, 30):
    sums = FeatureSums.of(given[rows], read[rows], 7)
    shards.append(ShardInfo("x", 1, 0, 1, 100, "", **dataclasses.asdict(sums)))
  storage = dataclasses.replace(Manifest.load(finished), shards=tuple(shards), records=3).storage
  cosines = (given * read).sum(1) / np.linalg.norm(given, axis=1) / np.linalg.norm(read, axis=1)
  np.testing.assert_allclose(storage.feature_mean_cosine, cosines.mean(), rtol=1e-12)
  np.testing.assert_allclose(storage.feature_relative_rmse, np.sqrt(((read - given)**2).mean() / (given**2).mean()),
                             rtol=1e-12)
  assert (storage.bytes_per_record, storage.feature_bytes_per_record) == (100, 7)


def test_a_new_record_as_a_reader_would_get_it(finished):
  record = RecordDirectory(finished)[0]
  draw = np.random.default_rng(3)
  exact = dataclasses.replace(record.picture, detection_features=draw.normal(size=(16, 256)).astype(np.float32))
  manifest = dataclasses.replace(Manifest.load(finished), detection_rows=5, feature_dtype="int8")
  read = manifest.as_read(dataclasses.replace(record, pictures=(exact, exact)))
  assert read.id == record.id and len(read.pictures) == 2
  expected, step = exact.detection_features[:5], np.abs(exact.detection_features[:5]).max(axis=1, keepdims=True) / 127
  for picture in read.pictures:
    assert picture.detection_boxes.shape == (5, 4) and picture.image == exact.image
    assert (np.abs(picture.detection_features - expected) <= 0.502 * step).all()
    assert np.abs(picture.detection_features - expected).max() > 0.3 * step.min()  # it was rounded indeed


def test_a_manifest_that_asks_for_what_records_lack(finished, tmp_path):
  copy = shutil.copytree(finished, tmp_path / "copy")
  had = Manifest.load(copy).optional_fields
  dataclasses.replace(Manifest.load(copy), optional_fields=(*had, "mask_rles")).save(copy)
  with pytest.raises(RecordError, match="00000-of-00003: record 0: not a record of schema 2: [^\n]*$"):
    RecordDirectory(copy)[0]
