"""TFRecord shards: framing, checksums, and random access by the index beside them.

A shard is a sequence of frames: u64 payload length, masked CRC-32C of those 8 bytes, payload, masked CRC-32C of the
payload, all little-endian.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterable

import google_crc32c
import numpy as np
from etils import epath

from refiner_export.common.files import is_local, writing
from refiner_export.common.unfinished import unfinished_path
from refiner_export.records.record import RecordError
from refiner_export.records.shard_files import IndexedShard, ShardInfo, ShardItem, ShardTally, index_path, size_of

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_HEADER = _LENGTH.size + _CHECKSUM.size
_OVERHEAD = _HEADER + _CHECKSUM.size


def write_shard(path: epath.PathLike, items: Iterable[ShardItem]) -> ShardInfo:
  """Writes a shard and its index.

  Both files get their names only when complete, the index first: a shard that can be seen is whole and has its index.
  Raises `UserError` when a file cannot be written.
  """
  path = epath.Path(path)
  digest, offset, tally = hashlib.sha256(), 0, ShardTally()
  unfinished = unfinished_path(path)
  try:
    with writing(path):
      file = unfinished.open("wb")
    try:
      for item in items:
        length = _LENGTH.pack(len(item.payload))
        for part in (length, _masked_crc(length), item.payload, _masked_crc(item.payload)):
          with writing(path):
            file.write(part)
          digest.update(part)
        tally.add(item, offset)
        offset += len(item.payload) + _OVERHEAD
    finally:
      with writing(path):  # closing writes what is left
        file.close()
    return tally.publish(unfinished, path, offset, digest.hexdigest())
  except BaseException:
    with contextlib.suppress(OSError):
      unfinished.unlink(missing_ok=True)
    raise


class ShardReader(IndexedShard):
  """Random access to one shard. Picklable and safe to share between threads; the file is opened at the first read.

  Raises:
    RecordError: the shard or its index is missing, damaged or cut short, or a checksum does not match.
  """

  def __init__(self, path: epath.PathLike, index_sha256: str = ""):
    super().__init__(path, index_sha256)
    ends = np.cumsum(self._index[:, 1] + _OVERHEAD)
    if not np.array_equal(self._index[:, 0], ends - self._index[:, 1] - _OVERHEAD):
      raise RecordError(f"{index_path(self.path)}: not an index of consecutive records; run the export again")
    self.bytes = int(ends[-1]) if len(ends) else 0
    size = size_of(self.path)
    if size != self.bytes:
      raise RecordError(f"{self.path}: {size} bytes, its index expects {self.bytes}; the file was cut short or "
                        "replaced: remove it and its .index, and run the export again")

  def read(self, position: int) -> bytes:
    """The payload of record `position`, 0 <= position < len, with both checksums verified."""
    self.check_position(position)
    offset, length = self._index[position, :2].tolist()
    frame = self._read_bytes(length + _OVERHEAD, offset)
    header, payload = frame[:_LENGTH.size], frame[_HEADER:-_CHECKSUM.size]
    if len(frame) != length + _OVERHEAD:
      raise RecordError(f"{self.path}: record {position} is cut short; copy or repair the shard")
    if header != _LENGTH.pack(length) or frame[_LENGTH.size:_HEADER] != _masked_crc(header):
      raise RecordError(f"{self.path}: record {position} has a bad length checksum; copy or repair the shard")
    if frame[-_CHECKSUM.size:] != _masked_crc(payload):
      raise RecordError(f"{self.path}: record {position} has a bad checksum; copy or repair the shard")
    return payload

  def __del__(self):
    if getattr(self, "_handle", None) is not None:
      self._handle.close()

  def _read_bytes(self, size: int, offset: int) -> bytes:
    with self._lock:
      if self._handle is None:
        self._handle = self.path.open("rb")
      if not is_local(self.path):
        # An object store's file has one position, which other threads would move.
        self._handle.seek(offset)
        return self._handle.read(size)
    return os.pread(self._handle.fileno(), size, offset)


def _masked_crc(data: bytes) -> bytes:
  crc = google_crc32c.value(data)
  return _CHECKSUM.pack((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
