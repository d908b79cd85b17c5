"""What the files of a shard have in common, whichever format: a description, an index beside it, atomic writing.

Beside shard `NAME` lies `NAME.index`, a .npy file of int64 (records, 4): offset of the record in the file in bytes (0
where the format has an index inside the file), length of its payload in bytes, number of its conversation items (see
`record.conversation_items`), number of its pictures. An index of schema 1 lacks the last column. The description of the
shard has the SHA-256 of the index.
"""

import dataclasses
import hashlib
import io
import threading
from collections.abc import Sequence

import numpy as np
from etils import epath

from refiner_export.common.files import reason, write_atomically, writing
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
    dropped: how many texts and annotations of its examples were left out, by reason.
    pictures_version: the hash of the versions of all pictures in the shard; "" where the source states none.
    index_sha256: of the index beside the file, in hex; "" in older directories.
    made_of: the hash of the settings and of the part of the source that decide the shard; "" in older directories.
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
  dropped: dict = dataclasses.field(default_factory=dict)
  pictures_version: str = ""
  index_sha256: str = ""
  made_of: str = ""


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
    index_sha256 = write_index(path, self._rows)
    with writing(path):
      unfinished.replace(path)
    _, _, conversations, pictures = np.array(self._rows, np.int64).reshape(-1, 4).sum(axis=0).tolist()
    sums = dataclasses.asdict(FeatureSums.total(self._measured))
    return ShardInfo(
        path.name, len(self._rows), conversations, pictures, size, sha256, **sums, index_sha256=index_sha256)


class IndexedShard:
  """What the readers of both formats share: the index, and a handle that is opened at the first read.

  Picklable and safe to share between threads. A subclass keeps its open file in `_handle` and guards it by `_lock`;
  neither is pickled.

  Args:
    path: the shard.
    index_sha256: of its index; "" where nobody knows it.

  Raises:
    RecordError: the index is missing, is no index, or is another one.
  """

  def __init__(self, path: epath.PathLike, index_sha256: str = ""):
    self.path = epath.Path(path)
    self._index = read_index(self.path, index_sha256)
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


def write_index(shard: epath.PathLike, rows: Sequence[tuple[int, int, int, int]]) -> str:
  """Returns the SHA-256 of the index, in hex."""
  buffer = io.BytesIO()
  np.save(buffer, np.array(rows, np.int64).reshape(-1, 4))
  write_atomically(index_path(shard), buffer.getvalue())
  return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_index(shard: epath.PathLike, sha256: str = "") -> np.ndarray:
  """int64 (records, 4). Raises `RecordError` when the file is missing, is no index, or has another SHA-256."""
  path = index_path(shard)
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    raise RecordError(f"{path}: the index is missing; copy it beside the shard or run the export again") from None
  except OSError as error:
    raise RecordError(f"{path}: cannot be read ({reason(error)})") from None
  if sha256 and hashlib.sha256(data).hexdigest() != sha256:
    raise RecordError(f"{path}: not an index of this shard: its checksum does not match; copy it beside the shard or "
                      "run the export again")
  try:
    table = np.load(io.BytesIO(data), allow_pickle=False)
  except Exception as error:  # a damaged header is parsed as Python, as a zip file or as a pickle
    raise RecordError(f"{path}: not an index ({reason(error)}); run the export again") from error
  is_table = isinstance(table, np.ndarray) and table.ndim == 2 and table.dtype == np.int64
  if not is_table or table.shape[1] not in (3, 4) or (table < 0).any():
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
  except OSError as error:
    raise RecordError(f"{shard}: cannot be read ({reason(error)})") from None
