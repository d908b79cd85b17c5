"""ArrayRecord shards: Grain's format, which has an index and checksums inside the file.

A chunk holds one record and nothing is compressed, because that is best for random access. The library reads
and writes local files only.
"""

import contextlib
from collections.abc import Iterable, Iterator

from array_record.python import array_record_module
from etils import epath

from refiner_export.common.files import hash_file, is_local, writing
from refiner_export.common.settings import UserError, require
from refiner_export.common.unfinished import unfinished_path
from refiner_export.records.record import RecordError
from refiner_export.records.shard_files import IndexedShard, ShardInfo, ShardItem, ShardTally, size_of

_WRITER = "group_size:1,uncompressed"
_READER = "readahead_buffer_size:0,max_parallelism:0"  # what the library advises for random access
_BUFFER = 32768  # bytes; Grain's choice


def write_shard(path: epath.PathLike, items: Iterable[ShardItem]) -> ShardInfo:
  """As `tfrecord.write_shard`. Raises `UserError` for a directory that is not local."""
  path = epath.Path(path)
  require(is_local(path), f"{path}: array_record needs a local or mounted directory: take config.format=tfrecord, or "
                          "mount the bucket")
  unfinished, tally = unfinished_path(path), ShardTally()
  try:
    with _writing(path):
      writer = array_record_module.ArrayRecordWriter(str(unfinished), _WRITER)
    for item in items:
      with _writing(path):
        writer.write(item.payload)
      tally.add(item)
    with _writing(path):  # closing raises what went wrong, such as a full disk
      writer.close()
    with writing(path):
      size, digest = unfinished.stat().length, hash_file(unfinished)
    return tally.publish(unfinished, path, size, digest)
  except BaseException:
    with contextlib.suppress(OSError):
      unfinished.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
  """As `files.writing`, for the library, whose errors are of another class."""
  try:
    yield
  except RuntimeError as error:
    raise UserError(f"{path}: cannot be written ({_first_reason(error)}): make room, or name another place") from error


class ArrayRecordReader(IndexedShard):
  """Random access to one shard; the same interface as `tfrecord.ShardReader`, and the same errors."""

  def __init__(self, path: epath.PathLike, index_sha256: str = ""):
    require(is_local(path), f"{path}: array_record needs a local or mounted directory: mount the bucket")
    super().__init__(path, index_sha256)
    self.bytes = size_of(self.path)
    reader = self._open()
    if reader.num_records() != len(self._index):
      raise RecordError(f"{self.path}: {reader.num_records()} records, its index tells of {len(self._index)}; remove "
                        "both, and run the export again")
    reader.close()

  def read(self, position: int) -> bytes:
    """The payload of record `position`, 0 <= position < len; the library verifies its hash."""
    self.check_position(position)
    with self._lock:
      if self._handle is None:
        self._handle = self._open()
    try:
      (payload,) = self._handle.read([position])
    except RuntimeError as error:
      raise RecordError(f"{self.path}: record {position} is damaged ({_first_reason(error)}); copy or repair the "
                        "shard") from error
    if len(payload) != self._index[position, 1]:
      raise RecordError(f"{self.path}: record {position} is of {len(payload)} bytes, its index tells of "
                        f"{self._index[position, 1]}; copy or repair the shard")
    return payload

  def _open(self) -> array_record_module.ArrayRecordReader:
    reader = array_record_module.ArrayRecordReader(str(self.path), _READER, file_reader_buffer_size=_BUFFER)
    if not reader.ok():
      try:
        reader.close()
        reason = "cannot be opened"
      except RuntimeError as error:  # only closing says what is wrong
        reason = _first_reason(error)
      raise RecordError(f"{self.path}: not a whole ArrayRecord file ({reason}); copy or repair the shard")
    return reader


def _first_reason(error: RuntimeError) -> str:
  """The library gives a list of reasons; the first reason says what is wrong."""
  return " ".join(str(error).split(";")[0].split())
