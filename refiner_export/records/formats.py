"""The formats of shards. A shard's name says its format: `lyrics_records-train.tfrecord-00000-of-00002`."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from etils import epath

from refiner_export.records import tfrecord
from refiner_export.records.record import RecordError
from refiner_export.records.shard_files import ShardInfo, ShardItem

FORMATS = ("tfrecord", "array_record")


class Shard(Protocol):
  """Random access to one shard, with the errors of `tfrecord.ShardReader`. Picklable; threads may share it."""
  path: epath.Path
  bytes: int

  def __len__(self) -> int: ...
  def read(self, position: int) -> bytes: ...

  @property
  def conversation_counts(self) -> np.ndarray: ...

  @property
  def picture_counts(self) -> np.ndarray: ...


def write_shard(path: epath.PathLike, items: Iterable[ShardItem]) -> ShardInfo:
  """Writes a shard of the format that its name says; see `tfrecord.write_shard`."""
  if not _is_array_record(path):
    return tfrecord.write_shard(path, items)
  from refiner_export.records import array_record  # its library does not exist for every system
  return array_record.write_shard(path, items)


def open_shard(path: epath.PathLike, index_sha256: str = "") -> Shard:
  """Opens a shard of the format that its name says; its index is compared with the SHA-256 where that is given."""
  if not _is_array_record(path):
    return tfrecord.ShardReader(path, index_sha256)
  from refiner_export.records import array_record
  return array_record.ArrayRecordReader(path, index_sha256)


def open_described(directory: epath.Path, info: ShardInfo) -> Shard:
  """Opens a shard that is described. Raises `RecordError` when its index, its size or a count is another one."""
  shard = open_shard(directory / info.file, info.index_sha256)
  found = {"records": len(shard), "conversations": int(shard.conversation_counts.sum()),
           "pictures": int(shard.picture_counts.sum()), "bytes": shard.bytes}
  for name, value in found.items():
    if value != getattr(info, name):
      raise RecordError(f"{shard.path}: {name} {value}, its description says {getattr(info, name)}; run the export "
                        "again")
  return shard


def _is_array_record(path: epath.PathLike) -> bool:
  return ".array_record-" in epath.Path(path).name
