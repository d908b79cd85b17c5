"""ArrayRecord shards: the format of Grain, with an index and checksums of its own.

One record to a chunk and no compression, as random access wants it. The library reads and writes local files only.
"""

import dataclasses
import threading
from collections.abc import Iterable

import numpy as np
from array_record.python import array_record_module
from etils import epath

from refiner_export.records.features import FeatureSums
from refiner_export.records.record import RecordError
from refiner_export.common.settings import require
from refiner_export.common.files import hash_file, is_local
from refiner_export.records.shard_files import ShardInfo, read_index, size_of, write_index
from refiner_export.common.unfinished import unfinished_path

_WRITER = "group_size:1,uncompressed"
_READER = "readahead_buffer_size:0,max_parallelism:0"  # what the library advises for random access
_BUFFER = 32768  # bytes; Grain's choice


def write_shard(path: epath.PathLike, items: Iterable[tuple]) -> ShardInfo:
  """As `tfrecord.write_shard`. Raises `UserError` for a directory that is not local."""
  path = epath.Path(path)
  require(is_local(path), f"{path}: array_record needs a local or mounted directory: take config.format=tfrecord, or "
                          "mount the bucket")
  unfinished, index, measured = unfinished_path(path), [], []
  try:
    writer = array_record_module.ArrayRecordWriter(str(unfinished), _WRITER)
    for payload, conversations, *sums in items:
      writer.write(payload)
      index.append((0, len(payload), conversations))
      measured += sums
    writer.close()  # raises what went wrong, such as a full disk
    size, digest = unfinished.stat().length, hash_file(unfinished)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise
  write_index(path, index)
  unfinished.replace(path)
  return ShardInfo(path.name, len(index), int(sum(row[2] for row in index)), size, digest,
                   **dataclasses.asdict(FeatureSums.total(measured)))


class ArrayRecordReader:
  """Random access to one shard; the same interface as `tfrecord.ShardReader`, and the same errors."""

  def __init__(self, path: epath.PathLike):
    self.path = epath.Path(path)
    require(is_local(self.path), f"{self.path}: array_record needs a local or mounted directory: mount the bucket")
    self._index = read_index(self.path)
    self.bytes = size_of(self.path)
    self._open_lazily()
    reader = self._open()
    if reader.num_records() != len(self._index):
      raise RecordError(f"{self.path}: {reader.num_records()} records, its index tells of {len(self._index)}; remove "
                        "both, and run the export again")
    reader.close()

  def __len__(self) -> int:
    return len(self._index)

  @property
  def conversation_counts(self) -> np.ndarray:
    """int64 (records,)"""
    return self._index[:, 2]

  def read(self, position: int) -> bytes:
    """The payload of record `position`, 0 <= position < len; the library verifies its hash."""
    if not 0 <= position < len(self):
      raise RecordError(f"{self.path}: record {position} asked for, the shard holds {len(self)}")
    with self._lock:
      self._reader = self._reader or self._open()
    try:
      (payload,) = self._reader.read([position])
    except RuntimeError as error:
      raise RecordError(f"{self.path}: record {position} is damaged ({_first(error)}); copy or export the shard "
                        "again") from error
    if len(payload) != self._index[position, 1]:
      raise RecordError(f"{self.path}: record {position} is of {len(payload)} bytes, its index tells of "
                        f"{self._index[position, 1]}; copy or export the shard again")
    return payload

  def __getstate__(self):
    return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_reader")}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open_lazily()

  def _open_lazily(self) -> None:
    self._lock, self._reader = threading.Lock(), None

  def _open(self) -> array_record_module.ArrayRecordReader:
    reader = array_record_module.ArrayRecordReader(str(self.path), _READER, file_reader_buffer_size=_BUFFER)
    if not reader.ok():
      try:
        reader.close()
        reason = "cannot be opened"
      except RuntimeError as error:  # it only says so here
        reason = _first(error)
      raise RecordError(f"{self.path}: not a whole ArrayRecord file ({reason}); copy or export the shard again")
    return reader


def _first(error: RuntimeError) -> str:
  """The library adds a stack of reasons; the first says what it is."""
  return " ".join(str(error).split(";")[0].split())
