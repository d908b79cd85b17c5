"""Records to batches with Grain: global shuffle, exact resume, a slice per host.

Every item has a position in one global order that depends only on the seed: epoch after epoch, each with a shuffle
of its own. A step takes the next positions, and host h of n takes the h-th part of them. The random numbers of an
item depend on the seed and its position alone. So a step sees the same examples, in the same rows, whatever the
number of hosts or threads.
"""

from collections.abc import Sequence

import grain
import numpy as np

from lyrics_jax.data import buckets
from lyrics_jax.data.batch import Fields
from lyrics_jax.data.rows import Example, Examples, Records
from lyrics_jax.data.settings import DataSettings
from refiner_export.common.settings import require
from refiner_export.records.reader import RecordDirectory

LoadedBatch = dict[str, "np.ndarray | list[str]"]  # the fields of a batch, and "records", the ids of the records


def open_records(data: DataSettings) -> RecordDirectory:
  """The directory `data.records`. Raises `UserError` when it is missing or another refiner made it."""
  return RecordDirectory(data.records, data.fingerprint or None)


def train_batches(data: DataSettings, examples: Examples, records: Records, batch_size: int, seed: int,
                  process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
  """Endless batches for this host, with texts at their full lengths.

  With several `data.buckets`, the examples of a few batches of a host are sorted by text length among those batches
  (see `buckets`). Then the number of hosts decides which examples meet in a step.

  The iterator's `get_state()` is a small JSON-able dictionary, the same on every host. `set_state` resumes right after
  the batch that was last taken when the state was read. See `for_hosts`.

  Args:
    examples: what `data.rows.examples` returns.
    batch_size: examples of the global batch; each of `process_count` hosts gets an equal part.
  """
  require(batch_size % process_count == 0,
          f"config.batch_size={batch_size} is not a multiple of the {process_count} processes")
  items = data.rows.items(records)
  require(len(items) > 0, f"config.data.records={data.records} holds no {data.rows.item}: export some first")
  of_host = batch_size // process_count
  epoch = grain.MapDataset.source(items).seed(seed).shuffle()
  if len(data.buckets) == 1:
    return _batches(data, epoch.repeat().random_map(examples), of_host, process_index, process_count)
  window = buckets.window_of(len(items) // batch_size)
  whole = len(items) // (window * batch_size) * window * batch_size  # the items of the whole windows of an epoch
  made = epoch[:whole or len(items)].repeat().random_map(examples)
  return _batches_by_length(data, examples.fields, made, of_host, window, seed, process_index, process_count)


def for_hosts(state: dict, before: int, now: int) -> dict:
  """The state of `train_batches` over `before` hosts as a state over `now` hosts, which resumes at the same position.

  Where examples are sorted by length, the window that was begun starts again: the part that was read is read twice.
  """
  if before == now or "parent" not in state:  # the state is a count of batches, and every host takes one in each step
    return state
  window = state["parent"]
  position = window["parent"]["next_index"] * before // now
  return {"parent": {**window, "parent": {"next_index": position}}, "next_index_in_buffer": 0}


def collate(examples: Sequence[Example]) -> LoadedBatch:
  """Examples to a batch: arrays (B, ...), and the records' ids as a list."""
  batch = {}
  for name in examples[0]:
    values = [example[name] for example in examples]
    if name == "record":
      batch["records"] = values
    else:
      batch[name] = np.stack(values)
  return batch


def _batches(data: DataSettings, examples: grain.MapDataset, batch_size: int, process_index: int,
             process_count: int) -> grain.DatasetIterator:
  batches = examples.batch(batch_size, drop_remainder=True, batch_fn=collate)[process_index::process_count]
  # Whole batches wait in the buffer, and they are large: one ready for every one in the making is enough.
  options = grain.ReadOptions(num_threads=data.workers, prefetch_buffer_size=2 * data.workers)
  return iter(batches.to_iter_dataset(options))


def _batches_by_length(data: DataSettings, fields: Fields, examples: grain.MapDataset, batch_size: int, window: int,
                       seed: int, process_index: int, process_count: int) -> grain.DatasetIterator:
  options = grain.ReadOptions(num_threads=data.workers, prefetch_buffer_size=2 * batch_size)
  of_host = examples[process_index::process_count].to_iter_dataset(options)
  windows = of_host.batch(window * batch_size, drop_remainder=True, batch_fn=list)
  batches = windows.random_map(_SortWindow(fields, batch_size), seed=seed)
  return iter(grain.experimental.FlatMapIterDataset(batches, _Unpack()))


class _SortWindow(grain.transforms.RandomMap):
  """Examples of a window -> its batches, sorted by text length, in random order."""

  def __init__(self, fields: Fields, batch_size: int):
    self._fields = fields
    self._batch_size = batch_size

  def random_map(self, examples: list[Example], rng: np.random.Generator) -> list[LoadedBatch]:
    order = rng.permutation(len(examples) // self._batch_size)
    return [collate(batch) for batch in buckets.sorted_batches(self._fields, examples, self._batch_size, order)]


class _Unpack(grain.experimental.FlatMapTransform):
  """A list of batches -> one after the other."""
  max_fan_out = buckets.WINDOW

  def flat_map(self, batches: list[LoadedBatch]) -> list[LoadedBatch]:
    return batches
