"""ArrayRecord shards: what goes in comes out, the trainer's loader reads them, damage is named by shard and record."""

import concurrent.futures
import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from refiner_export.records.array_record import ArrayRecordReader, write_shard
from refiner_export.records.features import FeatureSums
from refiner_export.records.formats import open_shard
from refiner_export.records.formats import write_shard as write_any
from refiner_export.records.manifest import Manifest, shard_name, write_tfds_metadata
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import Picture, RecordError
from refiner_export.common.settings import UserError
from refiner_export.records.shard_files import ShardItem, index_path
from refiner_export.records.tfrecord import ShardReader

DRAW = np.random.default_rng(0)
PAYLOADS = [DRAW.bytes(30_000), b"", b"third", DRAW.bytes(40_000)]


def items(sums: FeatureSums = FeatureSums()) -> list[ShardItem]:
  """Record k has k conversations and 3 - k pictures."""
  return [ShardItem(payload, k, 3 - k, sums) for k, payload in enumerate(PAYLOADS)]


@pytest.fixture
def shard(tmp_path):
  write_shard(tmp_path / "shard", iter(items()))
  return tmp_path / "shard"


def test_random_access_counts_and_description(shard):
  reader, data = ArrayRecordReader(shard), shard.read_bytes()
  assert [reader.read(k) for k in (2, 0, 3, 1)] == [PAYLOADS[k] for k in (2, 0, 3, 1)]
  assert reader.conversation_counts.tolist() == [0, 1, 2, 3]
  assert reader.picture_counts.tolist() == [3, 2, 1, 0]
  info = write_shard(shard, items(FeatureSums(5, 1, 2.0, 0.5, 1.0)))
  assert shard.read_bytes() == data  # the same records are the same bytes
  assert (info.file, info.records, info.conversations, info.pictures, info.bytes) == (
      "shard", len(reader), 6, 6, reader.bytes) == ("shard", 4, 6, 6, len(data))
  assert info.sha256 == hashlib.sha256(data).hexdigest() and (info.feature_bytes, info.squared_errors) == (20, 2.0)
  assert sorted(path.name for path in shard.parent.iterdir()) == ["shard", "shard.index"]


def test_grain_reads_the_file_with_its_own_reader(shard):
  source = array_record_data_source.ArrayRecordDataSource([str(shard)])
  assert list(source.__getitems__([0, 1, 2, 3])) == PAYLOADS


def test_reader_is_shared_by_pickle_and_threads(shard):
  reader = ArrayRecordReader(shard)
  reader.read(0)
  copy = pickle.loads(pickle.dumps(reader))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(copy.read, [k % 4 for k in range(400)])) == [PAYLOADS[k % 4] for k in range(400)]


def test_empty_shard(tmp_path):
  info = write_shard(tmp_path / "empty", iter(()))
  assert (info.records, len(ArrayRecordReader(tmp_path / "empty"))) == (0, 0)


def test_a_damaged_byte_is_noticed_where_it_matters(shard):
  """Each record is right or refused by number; some bytes of the file, of its padding, belong to none."""
  data, noticed = shard.read_bytes(), 0
  for position in range(0, len(data), 997):
    shard.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1:])
    try:
      reader = ArrayRecordReader(shard)
    except RecordError as error:
      assert str(error).startswith(f"{shard}: not a whole ArrayRecord file (") and "\n" not in str(error)
      noticed += 1
      continue
    for record, payload in enumerate(PAYLOADS):
      try:
        assert reader.read(record) == payload
      except RecordError as error:
        noticed += 1
        assert str(error).startswith(f"{shard}: record {record} is damaged (Corrupted Riegeli")
        assert str(error).endswith("copy or repair the shard") and "\n" not in str(error)
  assert noticed >= 70_000 // 997  # all that carries records


@pytest.mark.parametrize("left", [0, 1000, 65536, -1])
def test_truncated_shard(shard, left):
  shard.write_bytes(shard.read_bytes()[:left])
  with pytest.raises(RecordError, match=rf"^{shard}: not a whole ArrayRecord file \([^\n]*\); copy or repair [^\n]*$"):
    ArrayRecordReader(shard)


def test_missing_and_mixed_up_files(shard):
  index = index_path(shard)
  kept = index.read_bytes()
  index.unlink()
  with pytest.raises(RecordError, match=f"^{index}: the index is missing"):
    ArrayRecordReader(shard)
  np.save(index.open("wb"), np.zeros((3, 4), np.int64))
  with pytest.raises(RecordError, match=f"^{shard}: 4 records, its index tells of 3; remove both"):
    ArrayRecordReader(shard)
  np.save(index.open("wb"), np.zeros((4, 4), np.int64))
  with pytest.raises(RecordError, match=f"^{shard}: record 0 is of 30000 bytes, its index tells of 0; "):
    ArrayRecordReader(shard).read(0)
  index.write_bytes(kept)
  shard.unlink()
  with pytest.raises(RecordError, match=f"^{shard}: the shard is missing"):
    ArrayRecordReader(shard)


@pytest.mark.parametrize("position", [-1, 4])
def test_position_out_of_range(shard, position):
  with pytest.raises(RecordError, match=f"^{shard}: record {position} asked for, the shard holds 4$"):
    ArrayRecordReader(shard).read(position)


def test_an_interrupted_shard_leaves_nothing(tmp_path):
  def interrupted():
    yield ShardItem(b"one", 1, 1)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_shard(tmp_path / "shard", interrupted())
  assert list(tmp_path.iterdir()) == []


def test_only_local_directories():
  with pytest.raises(UserError, match="^gs://bucket/shard: array_record needs a local or mounted directory: take "):
    write_shard("gs://bucket/shard", [])


def test_the_name_tells_the_format(tmp_path):
  for format, kind in ("tfrecord", ShardReader), ("array_record", ArrayRecordReader):
    path = tmp_path / shard_name(0, 1, format)
    write_any(path, [ShardItem(b"payload", 1, 1)])
    assert type(open_shard(path)) is kind and open_shard(path).read(0) == b"payload"


@pytest.fixture(scope="module")
def converted(finished, tmp_path_factory):
  """The finished export's records, as ArrayRecord."""
  directory, source = tmp_path_factory.mktemp("array_record"), RecordDirectory(finished)
  manifest, schema = source.manifest, source.manifest.schema()
  cuts = [range(0, 3), range(3, 4)]
  shards = tuple(
      write_any(directory / shard_name(k, 2, "array_record"),
                [schema.item(source[i]) for i in cut])
      for k, cut in enumerate(cuts))
  manifest = dataclasses.replace(manifest, shards=shards, format="array_record", files={})
  write_tfds_metadata(directory, manifest)
  manifest.save(directory)
  return directory


def test_a_reader_needs_only_the_manifest(finished, converted):
  one, other = RecordDirectory(finished), pickle.loads(pickle.dumps(RecordDirectory(converted)))
  assert len(one) == len(other) and Manifest.load(converted).format == "array_record"
  for k in range(len(one)):
    assert dataclasses.replace(one[k], pictures=()) == dataclasses.replace(other[k], pictures=())
    for field in dataclasses.fields(Picture):
      np.testing.assert_array_equal(
          getattr(other[k].picture, field.name), getattr(one[k].picture, field.name), err_msg=field.name)
  for count, total in ("read_conversation_counts", 10), ("read_picture_counts", 4):
    np.testing.assert_array_equal(getattr(one, count)(), getattr(other, count)())
    assert getattr(one, count)().sum() == total


def test_tfds_reads_the_directory(converted):
  builder = tfds.builder_from_directory(str(converted))
  assert builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD
  assert [example["id"] for example in builder.as_data_source(split="train")] == [b"1", b"2", b"3", b"5"]


def test_a_damaged_directory_names_shard_and_record(converted, tmp_path):
  for path in converted.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  shard = tmp_path / shard_name(0, 2, "array_record")
  data = bytearray(shard.read_bytes())
  data[data.index(b"caption a of 2")] ^= 1
  shard.write_bytes(data)
  directory = RecordDirectory(tmp_path)
  assert directory[0].id == "1"
  with pytest.raises(RecordError, match=f"^{shard}: record 1 is damaged"):
    directory[1]
