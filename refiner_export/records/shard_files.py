"""What the files of a shard have in common, whichever format: a description, an index beside it, atomic writing.

Beside shard `NAME` lies `NAME.index`, a .npy file of int64 (records, 3): offset of the record in the file in bytes (0
where the format has an index of its own), length of its payload in bytes, number of conversations in it.
"""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from etils import epath

from refiner_export.records.record import RecordError
from refiner_export.common.files import write_atomically

@dataclasses.dataclass(frozen=True)
class ShardInfo:
  """What the manifest says about a shard: file name, counts, size in bytes, SHA-256 of the file in hex.

  The other fields are its `FeatureSums`; they are zero where nobody measured.
  """
  file: str
  records: int
  conversations: int
  bytes: int
  sha256: str
  feature_bytes: int = 0
  feature_rows: int = 0
  squared_values: float = 0.0
  squared_errors: float = 0.0
  cosines: float = 0.0


def index_path(shard: epath.PathLike) -> epath.Path:
  shard = epath.Path(shard)
  return shard.parent / f"{shard.name}.index"


def write_index(shard: epath.PathLike, rows: Sequence[tuple[int, int, int]]) -> None:
  buffer = io.BytesIO()
  np.save(buffer, np.array(rows, np.int64).reshape(-1, 3))
  write_atomically(index_path(shard), buffer.getvalue())


def read_index(shard: epath.PathLike) -> np.ndarray:
  """int64 (records, 3). Raises `RecordError` when the file is missing or is no index."""
  path = index_path(shard)
  try:
    table = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
  except FileNotFoundError:
    raise RecordError(f"{path}: the index is missing; copy it beside the shard or run the export again") from None
  except (ValueError, EOFError, OSError) as error:
    raise RecordError(f"{path}: not an index ({' '.join(str(error).split())}); run the export again") from error
  if table.ndim != 2 or table.shape[1:] != (3,) or table.dtype != np.int64 or (table < 0).any():
    raise RecordError(f"{path}: not an index of records; run the export again")
  return table


def size_of(shard: epath.Path) -> int:
  """In bytes. Raises `RecordError` when there is no such file."""
  try:
    return shard.stat().length
  except FileNotFoundError:
    raise RecordError(f"{shard}: the shard is missing; copy it or run the export again") from None


