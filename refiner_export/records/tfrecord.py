"""TFRecord shards: framing, checksums, and random access by the index beside them.

A shard is a sequence of frames: u64 payload length, masked CRC-32C of those 8 bytes, payload, masked CRC-32C of the
payload, all little-endian.
"""

import dataclasses
import hashlib
import os
import struct
import threading
from collections.abc import Iterable

import google_crc32c
import numpy as np
from etils import epath

from refiner_export.records.features import FeatureSums
from refiner_export.records.record import RecordError
from refiner_export.common.files import is_local
from refiner_export.records.shard_files import ShardInfo, index_path, read_index, size_of, write_index
from refiner_export.common.unfinished import unfinished_path

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_HEADER = _LENGTH.size + _CHECKSUM.size
_OVERHEAD = _HEADER + _CHECKSUM.size


def write_shard(path: epath.PathLike, items: Iterable[tuple]) -> ShardInfo:
  """Writes `items`, (payload, number of conversations) and perhaps the payload's `FeatureSums`, and their index.

  Both files get their names only when complete, the index first: a shard that can be seen is whole and has its index.
  """
  path = epath.Path(path)
  digest, offset, index, measured = hashlib.sha256(), 0, [], []
  unfinished = unfinished_path(path)
  try:
    with unfinished.open("wb") as file:
      for payload, conversations, *sums in items:
        length = _LENGTH.pack(len(payload))
        for part in (length, _masked_crc(length), payload, _masked_crc(payload)):
          file.write(part)
          digest.update(part)
        index.append((offset, len(payload), conversations))
        measured += sums
        offset += len(payload) + _OVERHEAD
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise
  write_index(path, index)
  unfinished.replace(path)
  return ShardInfo(path.name, len(index), int(sum(row[2] for row in index)), offset, digest.hexdigest(),
                   **dataclasses.asdict(FeatureSums.total(measured)))


class ShardReader:
  """Random access to one shard. Picklable and safe to share between threads; files are opened at the first read.

  Raises:
    RecordError: the shard or its index is missing, damaged or cut short, or a checksum does not match.
  """

  def __init__(self, path: epath.PathLike):
    self.path = epath.Path(path)
    self._index = self._read_index()
    self.bytes = int(self._index[-1, :2].sum() + _OVERHEAD) if len(self._index) else 0
    size = size_of(self.path)
    if size != self.bytes:
      raise RecordError(f"{self.path}: {size} bytes, its index expects {self.bytes}; the file was cut short or "
                        "replaced: remove it and its .index, and run the export again")
    self._open_lazily()

  def __len__(self) -> int:
    return len(self._index)

  @property
  def conversation_counts(self) -> np.ndarray:
    """int64 (records,)"""
    return self._index[:, 2]

  def read(self, position: int) -> bytes:
    """The payload of record `position`, 0 <= position < len, with both checksums verified."""
    if not 0 <= position < len(self):
      raise RecordError(f"{self.path}: record {position} asked for, the shard holds {len(self)}")
    offset, length, _ = (int(number) for number in self._index[position])
    frame = self._pread(length + _OVERHEAD, offset)
    header, payload = frame[:_LENGTH.size], frame[_HEADER:-_CHECKSUM.size]
    if len(frame) != length + _OVERHEAD:
      raise RecordError(f"{self.path}: record {position} is cut short; copy or export the shard again")
    if header != _LENGTH.pack(length) or frame[_LENGTH.size:_HEADER] != _masked_crc(header):
      raise RecordError(f"{self.path}: record {position} has a bad length checksum; copy or export the shard again")
    if frame[-_CHECKSUM.size:] != _masked_crc(payload):
      raise RecordError(f"{self.path}: record {position} has a bad checksum; copy or export the shard again")
    return payload

  def __getstate__(self):
    return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_file")}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open_lazily()

  def __del__(self):
    if getattr(self, "_file", None) is not None:
      self._file.close()

  def _open_lazily(self) -> None:
    self._lock, self._file = threading.Lock(), None

  def _pread(self, size: int, offset: int) -> bytes:
    with self._lock:
      if self._file is None:
        self._file = self.path.open("rb")
      if not is_local(self.path):  # an object store's file has one position, which threads would move for each other
        self._file.seek(offset)
        return self._file.read(size)
    return os.pread(self._file.fileno(), size, offset)

  def _read_index(self) -> np.ndarray:
    table = read_index(self.path)
    ends = np.cumsum(table[:, 1] + _OVERHEAD)
    if not np.array_equal(table[:, 0], ends - table[:, 1] - _OVERHEAD):
      raise RecordError(f"{index_path(self.path)}: not an index of consecutive records; run the export again")
    return table


def _masked_crc(data: bytes) -> bytes:
  crc = google_crc32c.value(data)
  return _CHECKSUM.pack((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
