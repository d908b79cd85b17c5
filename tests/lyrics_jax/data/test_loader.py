import collections
import itertools
import json
import pathlib
import re

import numpy as np
import pytest

import lyrics_jax.data
from lyrics_jax.data.buckets import WINDOW
from lyrics_jax.data.loader import ConversationSource, eval_batches, for_hosts, train_batches
from refiner_export.records.record import RecordError
from refiner_export.common.settings import UserError


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(some, other):
  assert len(some) == len(other)
  for a, b in zip(some, other):
    assert a.keys() == b.keys() and a["ids"] == b["ids"]
    for name in a.keys() - {"ids"}:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def rows(batch):
  """The examples of a batch as hashable values, whatever their order."""
  arrays = sorted(batch.keys() - {"ids"})
  return collections.Counter((record, *(batch[name][i].tobytes() for name in arrays))
                             for i, record in enumerate(batch["ids"]))


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_resume_is_exact(make_config, records, stage):
  config = make_config(stage=stage)
  batches = train_batches(config, records)
  take(batches, 3)
  state = json.loads(json.dumps(batches.get_state()))
  following = take(batches, 4)
  resumed = train_batches(config, records)
  resumed.set_state(state)
  assert_same(take(resumed, 4), following)
  batches.set_state(state)  # the same iterator goes back, too
  assert_same(take(batches, 4), following)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_threads_change_nothing(make_config, records, workers):
  reference = take(train_batches(make_config(stage="instruct"), records), 5)
  assert_same(take(train_batches(make_config(stage="instruct", data={"workers": workers}), records), 5), reference)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch(make_config, records, hosts):
  config = make_config(stage="instruct")
  whole = take(train_batches(config, records), 4)
  parts = [take(train_batches(config, records, host, hosts), 4) for host in range(hosts)]
  for step, batch in enumerate(whole):
    assert all(len(part[step]["ids"]) == config.batch_size // hosts for part in parts)
    together = {name: np.concatenate([part[step][name] for part in parts]) for name in batch.keys() - {"ids"}}
    assert_same([{**together, "ids": sum((part[step]["ids"] for part in parts), [])}], [batch])  # the same rows, too
  with pytest.raises(UserError, match="config.batch_size=4 is not a multiple of the 3 processes"):
    train_batches(config, records, 0, 3)


@pytest.mark.parametrize("buckets, read_again", [((1.0,), 0), ((0.25, 1.0), 2)], ids=["one length", "sorted by length"])
def test_a_run_goes_on_with_another_number_of_hosts(make_config, records, buckets, read_again):
  """Every conversation of two epochs exactly once, but for those of a window of sorted batches that was begun."""
  config = make_config(stage="instruct", batch_size=2, data={"buckets": buckets})
  hosts = [train_batches(config, records, host, 2) for host in range(2)]
  steps = WINDOW + read_again
  before = [name for host in hosts for batch in take(host, steps) for name in batch["ids"]]
  states = [json.loads(json.dumps(host.get_state())) for host in hosts]
  assert states[0] == states[1]
  alone = train_batches(config, records)
  alone.set_state(for_hosts(states[0], 2, 1))
  after = [name for batch in take(alone, 48 - WINDOW) for name in batch["ids"]]
  whole_window = before[:WINDOW] + before[steps:steps + WINDOW]  # of each host, the one example of each step
  assert collections.Counter(whole_window + after) == {record.id: 2 * len(record.conversations) for record in records}


def test_an_epoch_covers_every_conversation_once(make_config, records):
  config = make_config(stage="instruct")
  conversations = sum(len(record.conversations) for record in records)
  source = ConversationSource(records)
  assert len(source) == conversations == 48
  assert len({(record.id, index) for record, index in (source[i] for i in range(conversations))}) == conversations
  batches = take(train_batches(config, records), 2 * conversations // config.batch_size)
  epochs = [[name for batch in half for name in batch["ids"]] for half in (batches[:12], batches[12:])]
  for epoch in epochs:
    assert collections.Counter(epoch) == {record.id: len(record.conversations) for record in records}
  assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_records_without_conversations_are_passed_over(records, make_record):
  silent = [make_record(index, conversations=()) for index in (0, 2)]
  source = ConversationSource(type(records)([silent[0], make_record(1), silent[1]]))
  assert [(record.id, index) for record, index in map(source.__getitem__, range(len(source)))] == [
      ("picture-1", index) for index in range(8)]


def test_seed_and_shuffle(make_config, records):
  reference = take(train_batches(make_config(), records), 3)
  assert [b["ids"] for b in take(train_batches(make_config(seed=9), records), 3)] != [b["ids"] for b in reference]
  ordered = take(train_batches(make_config(data={"shuffle": False}), records), 3)
  assert [name for batch in ordered for name in batch["ids"]] == [f"picture-{i % 6}" for i in range(12)]
  assert not np.array_equal(ordered[0]["image"][0], ordered[1]["image"][2])  # another epoch, another view


def test_evaluation_is_one_plain_pass(make_config, records):
  batches = list(eval_batches(make_config(), records, batch_size=4))
  assert [batch["ids"] for batch in batches] == [[f"picture-{i}" for i in (0, 1, 2, 3)], ["picture-4", "picture-5"]]
  assert batches[1]["image"].shape == (2, 28, 28, 3)
  assert_same(batches, list(eval_batches(make_config(data={"crop_scale": (0.1, 0.2)}), records, batch_size=4)))


def test_an_error_in_a_thread_arrives_as_itself(make_config, records):
  class Damaged(type(records)):
    def __getitem__(self, position):
      raise RecordError(f"shard-00001: record {position}: checksum does not match")

  with pytest.raises(RecordError) as caught:
    next(train_batches(make_config(), Damaged(records)))
  assert re.fullmatch(r"shard-00001: record \d: checksum does not match", str(caught.value))


def test_nothing_to_read(make_config, records):
  with pytest.raises(UserError, match="config.data.records=memory holds no record: export"):
    train_batches(make_config(), type(records)())
  with pytest.raises(UserError, match="holds no conversation"):
    train_batches(make_config(stage="instruct"), type(records)())


def test_no_deep_learning_framework_is_imported():
  for path in pathlib.Path(lyrics_jax.data.__file__).parent.glob("*.py"):  # Grain itself loads JAX where there is one
    assert not re.search(r"^\s*(import|from) (jax|flax|torch|tensorflow)\b", path.read_text(), re.MULTILINE), path
