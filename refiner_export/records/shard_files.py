"""What the files of a shard have in common, whichever format: a description, an index beside it, atomic writing.

Beside shard `NAME` lies `NAME.index`, a .npy file of int64 (records, 4): offset of the record in the file in bytes (0
where the format has an index inside the file), length of its payload in bytes, number of its conversation items (see
`record.conversation_items`), number of its pictures. An index of schema 1 lacks the last column.
"""

import dataclasses
import io
import threading
from collections.abc import Sequence

import numpy as np
from etils import epath

from refiner_export.common.files import write_atomically
from refiner_export.records.features import FeatureSums
from refiner_export.records.record import RecordError


@dataclasses.dataclass(frozen=True)
class ShardItem:
  """A record as a shard takes it.

  Attributes:
    payload: the serialised record.
    conversations: the number of its conversation items.
    pictures: the number of its pictures.
    features: what storing its features costs; zero where nobody measured.
  """
  payload: bytes
  conversations: int
  pictures: int
  features: FeatureSums = FeatureSums()


@dataclasses.dataclass(frozen=True)
class ShardInfo:
  """What the manifest says about a shard.

  Attributes:
    file: the name of the file.
    records, conversations, pictures: how many the shard holds; conversations counts conversation items.
    bytes: the size of the file.
    sha256: of the file, in hex.
    feature_bytes ... cosines: the sums of the records' `FeatureSums`; zero where nobody measured.
    skipped: how many examples are missing because a picture cannot be read.
    texts: the hash of the texts and annotations that the source gave for the shard; "" in older directories.
  """
  file: str
  records: int
  conversations: int
  pictures: int
  bytes: int
  sha256: str
  feature_bytes: int = 0
  feature_rows: int = 0
  squared_values: float = 0.0
  squared_errors: float = 0.0
  cosines: float = 0.0
  skipped: int = 0
  texts: str = ""


class ShardTally:
  """Collects what the index and the description of a shard need while its records are written."""

  def __init__(self):
    self._rows: list[tuple[int, int, int, int]] = []
    self._measured: list[FeatureSums] = []

  def add(self, item: ShardItem, offset: int = 0) -> None:
    """Takes note of a record that was written `offset` bytes into the file."""
    self._rows.append((offset, len(item.payload), item.conversations, item.pictures))
    self._measured.append(item.features)

  def publish(self, unfinished: epath.Path, path: epath.Path, size: int, sha256: str) -> ShardInfo:
    """Gives the whole file its name, after its index has got its own: a shard that can be seen has its index."""
    write_index(path, self._rows)
    unfinished.replace(path)
    _, _, conversations, pictures = np.array(self._rows, np.int64).reshape(-1, 4).sum(axis=0).tolist()
    sums = dataclasses.asdict(FeatureSums.total(self._measured))
    return ShardInfo(path.name, len(self._rows), conversations, pictures, size, sha256, **sums)


class IndexedShard:
  """What the readers of both formats share: the index, and a handle that is opened at the first read.

  Picklable and safe to share between threads. A subclass keeps its open file in `_handle` and guards it by `_lock`;
  neither is pickled.

  Raises:
    RecordError: the index is missing or is no index.
  """

  def __init__(self, path: epath.PathLike):
    self.path = epath.Path(path)
    self._index = read_index(self.path)
    self._open_lazily()

  def __len__(self) -> int:
    return len(self._index)

  @property
  def conversation_counts(self) -> np.ndarray:
    """int64 (records,): conversation items."""
    return self._index[:, 2]

  @property
  def picture_counts(self) -> np.ndarray:
    """int64 (records,). An index of schema 1 does not say: 1 for every record."""
    return self._index[:, 3]

  def check_position(self, position: int) -> None:
    """Raises `RecordError` unless 0 <= position < len."""
    if not 0 <= position < len(self):
      raise RecordError(f"{self.path}: record {position} asked for, the shard holds {len(self)}")

  def __getstate__(self):
    state = dict(self.__dict__)
    del state["_lock"], state["_handle"]
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open_lazily()

  def _open_lazily(self) -> None:
    self._lock, self._handle = threading.Lock(), None


def index_path(shard: epath.PathLike) -> epath.Path:
  shard = epath.Path(shard)
  return shard.parent / f"{shard.name}.index"


def write_index(shard: epath.PathLike, rows: Sequence[tuple[int, int, int, int]]) -> None:
  buffer = io.BytesIO()
  np.save(buffer, np.array(rows, np.int64).reshape(-1, 4))
  write_atomically(index_path(shard), buffer.getvalue())


def read_index(shard: epath.PathLike) -> np.ndarray:
  """int64 (records, 4). Raises `RecordError` when the file is missing or is no index."""
  path = index_path(shard)
  try:
    table = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
  except FileNotFoundError:
    raise RecordError(f"{path}: the index is missing; copy it beside the shard or run the export again") from None
  except (ValueError, EOFError, OSError) as error:
    raise RecordError(f"{path}: not an index ({' '.join(str(error).split())}); run the export again") from error
  if table.ndim != 2 or table.shape[1] not in (3, 4) or table.dtype != np.int64 or (table < 0).any():
    raise RecordError(f"{path}: not an index of records; run the export again")
  if table.shape[1] == 3:  # schema 1, where a record had one picture
    table = np.concatenate([table, np.ones((len(table), 1), np.int64)], axis=1)
  return table


def size_of(shard: epath.Path) -> int:
  """In bytes. Raises `RecordError` when there is no such file."""
  try:
    return shard.stat().length
  except FileNotFoundError:
    raise RecordError(f"{shard}: the shard is missing; copy it or run the export again") from None
