"""TFRecord shards: framing, checksums, the index sidecar that gives random access, and the atomic writer.

A shard is a sequence of frames: u64 payload length, masked CRC-32C of those 8 bytes, payload, masked CRC-32C of the
payload, all little-endian. Beside `NAME` lies `NAME.index`, a .npy file of int64 (records, 3): offset of the frame in
bytes, length of the payload in bytes, number of conversations in the record.
"""

import dataclasses
import hashlib
import io
import os
import struct
import threading
from collections.abc import Iterable

import google_crc32c
import numpy as np
from etils import epath

from refiner_export.record import RecordError

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_HEADER = _LENGTH.size + _CHECKSUM.size
_OVERHEAD = _HEADER + _CHECKSUM.size


@dataclasses.dataclass(frozen=True)
class ShardInfo:
  """What the manifest says about a shard: file name, counts, size in bytes, SHA-256 of the file in hex."""
  file: str
  records: int
  conversations: int
  bytes: int
  sha256: str


def write_shard(path: epath.PathLike, items: Iterable[tuple[bytes, int]]) -> ShardInfo:
  """Writes `items`, pairs of (payload, number of conversations), and their index.

  Both files get their names only when complete, the index first: a shard that can be seen is whole and has its index.
  """
  path = epath.Path(path)
  digest, offset, index = hashlib.sha256(), 0, []
  unfinished = _unfinished(path)
  with unfinished.open("wb") as file:
    for payload, conversations in items:
      length = _LENGTH.pack(len(payload))
      for part in (length, _masked_crc(length), payload, _masked_crc(payload)):
        file.write(part)
        digest.update(part)
      index.append((offset, len(payload), conversations))
      offset += len(payload) + _OVERHEAD
  table, buffer = np.array(index, np.int64).reshape(-1, 3), io.BytesIO()
  np.save(buffer, table)
  write_atomically(index_path(path), buffer.getvalue())
  unfinished.replace(path)
  return ShardInfo(path.name, len(table), int(table[:, 2].sum()), offset, digest.hexdigest())


def inspect_shard(path: epath.PathLike) -> ShardInfo:
  """Reads a finished shard from end to end and describes it. Raises `RecordError` when anything in it is damaged."""
  path, digest = epath.Path(path), hashlib.sha256()
  reader = ShardReader(path)
  for position in range(len(reader)):
    digest.update(reader.frame(position))
  return ShardInfo(path.name, len(reader), int(reader.conversation_counts.sum()), reader.bytes, digest.hexdigest())


def write_atomically(path: epath.Path, data: bytes) -> None:
  """Writes under a temporary name in the same folder, then renames: nobody ever sees half a file."""
  unfinished = _unfinished(path)
  unfinished.write_bytes(data)
  unfinished.replace(path)


def index_path(shard: epath.PathLike) -> epath.Path:
  shard = epath.Path(shard)
  return shard.parent / f"{shard.name}.index"


class ShardReader:
  """Random access to one shard. Picklable and safe to share between threads; files are opened at the first read.

  Raises:
    RecordError: the shard or its index is missing, damaged or cut short, or a checksum does not match.
  """

  def __init__(self, path: epath.PathLike):
    self.path = epath.Path(path)
    self._index = self._read_index()
    self.bytes = int(self._index[-1, :2].sum() + _OVERHEAD) if len(self._index) else 0
    size = self._size()
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
    frame = self.frame(position)
    return frame[_HEADER:-_CHECKSUM.size]

  def frame(self, position: int) -> bytes:
    """The whole frame of record `position`, verified."""
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
    return frame

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
      if not _is_local(self.path):  # an object store's file has one position, which threads would move for each other
        self._file.seek(offset)
        return self._file.read(size)
    return os.pread(self._file.fileno(), size, offset)

  def _size(self) -> int:
    try:
      return self.path.stat().length
    except FileNotFoundError:
      raise RecordError(f"{self.path}: the shard is missing; copy it or run the export again") from None

  def _read_index(self) -> np.ndarray:
    path = index_path(self.path)
    try:
      table = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except FileNotFoundError:
      raise RecordError(f"{path}: the index is missing; copy it beside the shard or run the export again") from None
    except (ValueError, EOFError, OSError) as error:
      raise RecordError(f"{path}: not an index ({' '.join(str(error).split())}); run the export again") from error
    lengths = table[:, 1] if table.ndim == 2 and table.shape[1:] == (3,) and table.dtype == np.int64 else None
    if lengths is None or not np.array_equal(table[:, 0], np.cumsum(lengths + _OVERHEAD) - lengths - _OVERHEAD):
      raise RecordError(f"{path}: not an index of consecutive records; run the export again")
    return table


def _masked_crc(data: bytes) -> bytes:
  crc = google_crc32c.value(data)
  return _CHECKSUM.pack((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _is_local(path: epath.Path) -> bool:
  return "://" not in os.fspath(path)


def _unfinished(path: epath.Path) -> epath.Path:
  return path.parent / f".unfinished.{path.name}"
