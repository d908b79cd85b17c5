"""Records to batches with Grain: global shuffle, exact resume, a slice per host.

Every item has a position in one global order that depends only on the seed: epoch after epoch, each shuffled anew. A step
takes the next positions, host h of n the h-th part of them, and an item's random numbers depend on the seed and its
position alone. So a step sees the same examples, in the same rows, whatever the number of hosts or threads.
"""

import functools
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

from lyrics_jax.config import Config
from lyrics_jax.data import buckets
from lyrics_jax.data.align_examples import AlignExamples
from lyrics_jax.data.instruct_examples import InstructExamples
from lyrics_jax.data.tokenizers import load_llm_tokenizer, load_mq_former_tokenizer, require_vocabulary
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import Record
from refiner_export.common.settings import require

Batch = dict[str, np.ndarray | list[str]]  # an example's arrays stacked, and "ids", the records' names


class Records(Protocol):
  """What is read: `reader.RecordDirectory`, or anything like it."""

  def __len__(self) -> int: ...
  def __getitem__(self, position: int) -> Record: ...
  def read_conversation_counts(self) -> np.ndarray: ...


class ConversationSource:
  """Random access to (record, index of conversation), over all conversations of all records."""

  def __init__(self, records: Records):
    self._records = records
    self._ends = np.cumsum(records.read_conversation_counts(), dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, position: int) -> tuple[Record, int]:
    record = int(np.searchsorted(self._ends, position, side="right"))
    start = int(self._ends[record - 1]) if record else 0
    return self._records[record], int(position) - start


def open_records(config: Config) -> RecordDirectory:
  """The directory `config.data.records`; `UserError` when it is missing or another refiner made it."""
  return RecordDirectory(config.data.records, config.data.fingerprint or None)


def make_examples(config: Config) -> AlignExamples | InstructExamples:
  """What turns an item into an example in `config.stage`; `UserError` when a tokenizer is missing or too large."""
  mq_former = load_mq_former_tokenizer(config.data.mq_former_tokenizer)
  require_vocabulary(mq_former, config.model.mq_former.vocab_size, "config.model.mq_former.vocab_size")
  if config.stage == "align":
    return AlignExamples(config, mq_former)
  llm = load_llm_tokenizer(config.data.llm_tokenizer)
  require_vocabulary(llm, config.model.llm.vocab_size, "config.model.llm.vocab_size")
  return InstructExamples(config, mq_former, llm)


def train_batches(config: Config, records: Records, process_index: int = 0,
                  process_count: int = 1) -> grain.DatasetIterator:
  """Endless batches of `config.batch_size / process_count` examples for this host, texts at their full lengths.

  With several `config.data.buckets` a host's examples of a few batches are sorted by text length among those batches (see
  `buckets`); which examples meet in a step then depends on the number of hosts.

  The iterator's `get_state()` is a small JSON-able dictionary, the same on every host; `set_state` resumes right after the
  batch that was last taken when the state was read. See `for_hosts`.
  """
  require(config.batch_size % process_count == 0,
          f"config.batch_size={config.batch_size} is not a multiple of the {process_count} processes")
  items = _items(config, records)
  if config.data.shuffle:
    items = items.shuffle()
  examples = items.repeat().random_map(make_examples(config))
  batch = _batch if len(config.data.buckets) == 1 else _batch_by_length
  return batch(config, examples, config.batch_size // process_count, process_index, process_count)


def for_hosts(state: dict, before: int, now: int) -> dict:
  """The state of `train_batches` over `before` hosts as one over `now` hosts, which resumes at the same position.

  Where examples are sorted by length the window that was begun starts again: its part that was read is read twice.
  """
  if before == now or "parent" not in state:  # a count of batches, and every host takes one in each step
    return state
  window = state["parent"]
  position = window["parent"]["next_index"] * before // now
  return {"parent": {**window, "parent": {"next_index": position}}, "next_index_in_buffer": 0}


def eval_batches(config: Config, records: Records, batch_size: int, process_index: int = 0,
                 process_count: int = 1) -> Iterator[Batch]:
  """Each item once, in order: whole pictures, first caption, first template. The last batch may be smaller."""
  examples = _items(config, records).random_map(functools.partial(make_examples(config), augment=False))
  return _batch(config, examples, batch_size, process_index, process_count, last=True)


def collate(examples: list[dict[str, np.ndarray | str]]) -> Batch:
  """Examples to a batch: arrays (B, ...), and the ids as a list."""
  batch = {name: np.stack([example[name] for example in examples]) for name in examples[0] if name != "id"}
  return {**batch, "ids": [example["id"] for example in examples]}


def _items(config: Config, records: Records) -> grain.MapDataset:
  align = config.stage == "align"
  source = records if align else ConversationSource(records)
  wanted = "record" if align else "conversation"
  require(len(source) > 0, f"config.data.records={config.data.records} holds no {wanted}: export some first")
  return grain.MapDataset.source(source).seed(config.seed)


def _batch(config: Config, examples: grain.MapDataset, batch_size: int, process_index: int, process_count: int,
           last: bool = False) -> grain.DatasetIterator:
  """`last`: whether the examples end, with a batch of what is left."""
  batches = examples.batch(batch_size, drop_remainder=not last, batch_fn=collate)[process_index::process_count]
  # Whole batches wait in the buffer, each of them large: one ready for every one in the making is enough.
  options = grain.ReadOptions(num_threads=config.data.workers, prefetch_buffer_size=2 * config.data.workers)
  return iter(batches.to_iter_dataset(options))


class _SortWindow(grain.transforms.RandomMap):
  """Examples of a window -> its batches, sorted by text length, in random order."""

  def __init__(self, batch_size: int):
    self._batch_size = batch_size

  def random_map(self, examples: list[dict], rng: np.random.Generator) -> list[Batch]:
    order = rng.permutation(len(examples) // self._batch_size)
    return [collate(batch) for batch in buckets.sorted_batches(examples, self._batch_size, order)]


class _Unpack(grain.experimental.FlatMapTransform):
  """A list of batches -> one after the other."""
  max_fan_out = buckets.WINDOW

  def flat_map(self, batches: list[Batch]) -> list[Batch]:
    return batches


def _batch_by_length(config: Config, examples: grain.MapDataset, batch_size: int, process_index: int,
                     process_count: int) -> grain.DatasetIterator:
  options = grain.ReadOptions(num_threads=config.data.workers, prefetch_buffer_size=2 * batch_size)
  windows = examples[process_index::process_count].to_iter_dataset(options).batch(
      buckets.WINDOW * batch_size, drop_remainder=True, batch_fn=list)
  batches = windows.random_map(_SortWindow(batch_size), seed=config.seed)
  return iter(grain.experimental.FlatMapIterDataset(batches, _Unpack()))
