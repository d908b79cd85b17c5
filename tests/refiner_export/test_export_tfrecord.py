"""Framing against an independent reading of the format, and every kind of damage."""

import concurrent.futures
import hashlib
import pickle
import struct

import numpy as np
import pytest

from refiner_export.records.features import FeatureSums
from refiner_export.records.record import RecordError
from refiner_export.records.shard_files import ShardItem, index_path
from refiner_export.records.tfrecord import ShardReader, write_shard

PAYLOADS = [b"first", b"", b"third" * 50]


def items() -> list[ShardItem]:
  """Record k has k conversations and 2 - k pictures."""
  return [ShardItem(payload, k, 2 - k) for k, payload in enumerate(PAYLOADS)]


def crc32c(data: bytes) -> int:
  """Castagnoli's CRC, bit by bit."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def read_all(path) -> list[bytes]:
  reader = ShardReader(path)
  return [reader.read(position) for position in range(len(reader))]


def masked(data: bytes) -> int:
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


@pytest.fixture
def shard(tmp_path):
  path = tmp_path / "shard"
  write_shard(path, iter(items()))
  return path


def test_frames_are_as_the_format_says(shard):
  assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
  data, offset = shard.read_bytes(), 0
  for payload in PAYLOADS:
    (length,) = struct.unpack_from("<Q", data, offset)
    assert struct.unpack_from("<I", data, offset + 8)[0] == masked(data[offset:offset + 8])
    assert data[offset + 12:offset + 12 + length] == payload
    assert struct.unpack_from("<I", data, offset + 12 + length)[0] == masked(payload)
    offset += length + 16
  assert offset == len(data)


def test_random_access_counts_and_description(shard):
  reader = ShardReader(shard)
  assert [reader.read(k) for k in (2, 0, 1)] == [PAYLOADS[k] for k in (2, 0, 1)]
  assert reader.conversation_counts.tolist() == [0, 1, 2]
  before = shard.read_bytes()
  assert reader.picture_counts.tolist() == [2, 1, 0]
  info = write_shard(shard, iter(items()))
  assert shard.read_bytes() == before and info.sha256 == hashlib.sha256(before).hexdigest()
  assert (info.file, info.records, info.conversations, info.pictures, info.bytes) == (
      "shard", 3, 3, 3, len(before))
  assert (len(reader), reader.conversation_counts.sum(), reader.picture_counts.sum(), reader.bytes) == (
      3, 3, 3, len(before))
  assert sorted(path.name for path in shard.parent.iterdir()) == ["shard", "shard.index"]


def test_reader_is_shared_by_pickle_and_threads(shard):
  reader = ShardReader(shard)
  reader.read(0)
  copy = pickle.loads(pickle.dumps(reader))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(copy.read, [k % 3 for k in range(300)])) == [PAYLOADS[k % 3] for k in range(300)]


def test_an_index_of_before_there_were_picture_counts(shard):
  """It has three columns, and every record had one picture."""
  with index_path(shard).open("rb") as file:
    table = np.load(file)
  with index_path(shard).open("wb") as file:
    np.save(file, table[:, :3])
  reader = ShardReader(shard)
  assert reader.picture_counts.tolist() == [1, 1, 1] and reader.conversation_counts.tolist() == [0, 1, 2]
  assert read_all(shard) == PAYLOADS


def test_empty_shard(tmp_path):
  info = write_shard(tmp_path / "empty", iter(()))
  assert (info.records, info.bytes, len(ShardReader(tmp_path / "empty"))) == (0, 0, 0)


def test_every_single_damaged_byte_is_noticed(shard):
  data = shard.read_bytes()
  for position in range(len(data)):
    shard.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1:])
    with pytest.raises(RecordError, match=rf"^{shard}: record \d has a bad (length )?checksum; copy or repair [^\n]*$"):
      read_all(shard)


def fails(path, message):
  with pytest.raises(RecordError) as error:
    ShardReader(path)
  assert str(error.value).startswith(f"{message}") and "\n" not in str(error.value)


def test_truncated_shard(shard):
  size = shard.stat().st_size
  shard.write_bytes(shard.read_bytes()[:-3])
  fails(shard, f"{shard}: {size - 3} bytes, its index expects {size}; the file was cut short")


def test_missing_files(shard):
  index = index_path(shard)
  kept = index.read_bytes()
  index.unlink()
  fails(shard, f"{index}: the index is missing; copy it beside the shard or run the export again")
  index.write_bytes(kept)
  shard.unlink()
  fails(shard, f"{shard}: the shard is missing")


@pytest.mark.parametrize("content", [
    b"", b"noise", np.zeros((3, 4), np.int64), np.zeros((3, 2), np.int64), np.zeros((3, 4)),
    -np.ones((1, 4), np.int64)])
def test_bad_index(shard, content):
  index = index_path(shard)
  if isinstance(content, bytes):
    index.write_bytes(content)
  else:
    with index.open("wb") as file:
      np.save(file, content)
  fails(shard, f"{index}: not an index")


@pytest.mark.parametrize("position", [-1, 3])
def test_position_out_of_range(shard, position):
  with pytest.raises(RecordError, match=f"^{shard}: record {position} asked for, the shard holds 3$"):
    ShardReader(shard).read(position)


def test_the_sums_of_features_are_those_of_the_records(tmp_path):
  sums = [FeatureSums(10, 2, 3.0, 0.5, 1.9), FeatureSums(20, 3, 1e16, 0.25, 2.8), FeatureSums(0, 0, 1.0, 0.0, 0.0)]
  info = write_shard(tmp_path / "shard", [ShardItem(b"payload", 1, 1, part) for part in sums])
  assert (info.feature_bytes, info.feature_rows, info.squared_errors) == (30, 5, 0.75)
  assert info.squared_values == 1e16 + 4  # adding one after the other in float64 gives 1e16 + 2


def test_an_interrupted_shard_is_not_visible(tmp_path):
  def interrupted():
    yield ShardItem(b"one", 1, 1)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_shard(tmp_path / "shard", interrupted())
  assert not (tmp_path / "shard").exists() and not index_path(tmp_path / "shard").exists()
