"""The formats of shards. A shard's name says its format: `lyrics_records-train.tfrecord-00000-of-00002`."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from etils import epath

from refiner_export.records import tfrecord
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


def open_shard(path: epath.PathLike) -> Shard:
  """Opens a shard of the format that its name says."""
  if not _is_array_record(path):
    return tfrecord.ShardReader(path)
  from refiner_export.records import array_record
  return array_record.ArrayRecordReader(path)


def _is_array_record(path: epath.PathLike) -> bool:
  return ".array_record-" in epath.Path(path).name
