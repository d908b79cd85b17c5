"""Reading an exported directory: random access to its records over all shards."""

import bisect

import numpy as np
from etils import epath

from refiner_export.common.settings import reachable, require
from refiner_export.common.stores import store_errors
from refiner_export.records.formats import open_described
from refiner_export.records.manifest import DAMAGED, Manifest
from refiner_export.records.record import Record, RecordError

_NO_COUNTS = np.zeros(0, np.int64)


class RecordDirectory:
  """`len` records; `directory[i]` decodes one, 0 <= i < len. Picklable; threads may share it.

  Args:
    path: an exported directory, local or remote.
    fingerprint: the fingerprint that the configuration expects of the refiner; None accepts any.

  Raises:
    UserError: no manifest, another schema, or another refiner than expected.
    RecordError: a shard or an index is missing or damaged.
  """

  def __init__(self, path: epath.PathLike, fingerprint: str | None = None):
    self.path = reachable(path)
    with store_errors(path):
      self._open(fingerprint)

  def _open(self, fingerprint: str | None) -> None:
    self.manifest = Manifest.load(self.path)
    require(fingerprint in (None, self.manifest.fingerprint),
            f"{self.path}: made by refiner {self.manifest.fingerprint} ({self.manifest.refiner['name']}), the "
            f"configuration expects {fingerprint}: export again, or set the expected fingerprint to "
            f"{self.manifest.fingerprint}")
    for problem in self.manifest.check_files(self.path):
      raise RecordError(problem)
    self._shards = []
    self._starts = [0]  # the position of each shard's first record, and the number of all records
    for info in self.manifest.shards:
      shard = open_described(self.path, info)
      self._shards.append(shard)
      self._starts.append(self._starts[-1] + len(shard))
    require(self._starts[-1] == self.manifest.records,
            f"{self.path}: the shards hold {self._starts[-1]} records, the manifest says {self.manifest.records}: "
            f"{DAMAGED}")
    self._schema = self.manifest.schema()

  def __len__(self) -> int:
    return self.manifest.records

  def __getitem__(self, position: int) -> Record:
    if not 0 <= position < len(self):
      raise IndexError(f"{self.path}: record {position} asked for, the directory holds {len(self)}")
    shard = bisect.bisect_right(self._starts, position) - 1
    reader, within = self._shards[shard], position - self._starts[shard]
    with store_errors(self.path):
      serialized = reader.read(within)
    try:
      return self._schema.decode(serialized)
    except RecordError as error:
      raise RecordError(f"{reader.path}: record {within}: {error}") from error

  def read_conversation_counts(self) -> np.ndarray:
    """int64 (records,): the number of conversations in each record, from the indexes alone."""
    return np.concatenate([_NO_COUNTS, *[shard.conversation_counts for shard in self._shards]])

  def read_picture_counts(self) -> np.ndarray:
    """int64 (records,): the number of pictures in each record, from the indexes alone.

    A directory of schema 1 does not say: the count is 1 for every record, also for a record of text alone.
    """
    return np.concatenate([_NO_COUNTS, *[shard.picture_counts for shard in self._shards]])

  def __getstate__(self):
    state = dict(self.__dict__)
    del state["_schema"]  # TFDS does not promise that its features can be pickled
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._schema = self.manifest.schema()
