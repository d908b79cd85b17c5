import collections
import dataclasses
import itertools
import json
import pathlib
import re

import numpy as np
import pytest

import lyrics_jax.data
import lyrics_jax.tasks
from lyrics_jax.data.buckets import WINDOW
from lyrics_jax.data.conversations import Conversations, ConversationSource
from lyrics_jax.data.loader import for_hosts
from refiner_export.common.settings import UserError
from refiner_export.records.record import RecordError, conversation_items


def take(batches, count):
  return list(itertools.islice(batches, count))


def names(batches):
  return [name for batch in batches for name in batch["records"]]


def assert_same(some, other):
  assert len(some) == len(other)
  for a, b in zip(some, other):
    assert a.keys() == b.keys() and a["records"] == b["records"]
    for name in a.keys() - {"records"}:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def epoch_of(records):
  """How often each record is met in an epoch of conversations."""
  return {record.id: len(conversation_items(record)) for record in records}


def test_resume_is_exact(make_run, records, rows):
  run = make_run(rows)
  batches = run.batches(records)
  take(batches, 3)
  state = json.loads(json.dumps(batches.get_state()))
  following = take(batches, 4)
  resumed = run.batches(records)
  resumed.set_state(state)
  assert_same(take(resumed, 4), following)
  batches.set_state(state)  # the same iterator goes back, too
  assert_same(take(batches, 4), following)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_threads_change_nothing(make_run, records, workers):
  reference = take(make_run(Conversations()).batches(records), 5)
  assert_same(take(make_run(Conversations(), workers=workers).batches(records), 5), reference)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch(make_run, records, hosts):
  run = make_run(Conversations())
  whole = take(run.batches(records), 4)
  parts = [take(run.batches(records, host, hosts), 4) for host in range(hosts)]
  for step, batch in enumerate(whole):
    assert all(len(part[step]["records"]) == 4 // hosts for part in parts)
    together = {"records": names(part[step] for part in parts)}
    for name in batch.keys() - {"records"}:
      together[name] = np.concatenate([part[step][name] for part in parts])
    assert_same([together], [batch])  # the same rows, too
  with pytest.raises(UserError, match="config.batch_size=4 is not a multiple of the 3 processes"):
    run.batches(records, 0, 3)


@pytest.mark.parametrize("buckets, read_again", [((1.0,), 0), ((0.25, 1.0), 2)], ids=["one length", "sorted by length"])
def test_a_run_goes_on_with_another_number_of_hosts(make_run, records, buckets, read_again):
  """Every conversation of two epochs exactly once, but for those of a window of sorted batches that was begun."""
  records = type(records)(dataclasses.replace(record, captions=()) for record in records)  # 48 items are whole windows
  run = make_run(Conversations(), batch_size=2, buckets=buckets)
  hosts = [run.batches(records, host, 2) for host in range(2)]
  steps = WINDOW + read_again
  before = [name for host in hosts for name in names(take(host, steps))]
  states = [json.loads(json.dumps(host.get_state())) for host in hosts]
  assert states[0] == states[1]
  alone = run.batches(records)
  alone.set_state(for_hosts(states[0], 2, 1))
  after = names(take(alone, 48 - WINDOW))
  whole_window = before[:WINDOW] + before[steps:steps + WINDOW]  # of each host, the one example of each step
  assert collections.Counter(whole_window + after) == {name: 2 * count for name, count in epoch_of(records).items()}


def test_an_epoch_covers_every_conversation_once(make_run, records):
  source = ConversationSource(records)
  assert len(source) == sum(epoch_of(records).values()) == 66
  assert len({(record.id, index) for record, index in (source[i] for i in range(66))}) == 66
  batches = take(make_run(Conversations(), batch_size=3).batches(records), 44)
  epochs = [names(batches[:22]), names(batches[22:])]
  for epoch in epochs:
    assert collections.Counter(epoch) == epoch_of(records)
  assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_the_seed_decides_the_order(make_run, records):
  reference = names(take(make_run().batches(records), 3))
  assert names(take(make_run(seed=9).batches(records), 3)) != reference
  assert names(take(make_run().batches(records), 3)) == reference


def test_an_epoch_covers_every_record_once_each_under_another_view(make_run, records):
  batches = take(make_run(batch_size=6).batches(records), 2)
  assert sorted(batches[0]["records"]) == sorted(batches[1]["records"]) == [f"picture-{i}" for i in range(6)]
  first, second = batches[0]["records"].index("picture-0"), batches[1]["records"].index("picture-0")
  assert not np.array_equal(batches[0]["image"][first], batches[1]["image"][second])


def test_batches_have_the_shapes_of_the_table(make_run, make_record, records):
  """Rows of several pictures, of one picture, and of text alone in one batch."""
  text = make_record(2, pictures=0, captions=(), conversations=(("dialogue", ("Who are you?", "A model.")),))
  mixed = type(records)([make_record(0, pictures=2), make_record(1), text])
  run = make_run(Conversations(), pictures=2)
  met = set()
  for batch in take(run.batches(mixed), 6):
    for name, field in run.fields.items():
      assert batch[name].shape == field.shape(run.dimensions) and batch[name].dtype == field.dtype, name
    met |= set(batch["picture_mask"].sum(1).tolist())
    highest = batch["slot"].max(1)
    np.testing.assert_array_equal(highest, 4 * batch["picture_mask"].sum(1) - 1)
  assert met == {0, 1, 2}


def test_an_error_in_a_thread_arrives_as_itself(make_run, records):
  class Damaged(type(records)):
    def __getitem__(self, position):
      raise RecordError(f"shard-00001: record {position}: checksum does not match")

  with pytest.raises(RecordError) as caught:
    next(make_run().batches(Damaged(records)))
  assert re.fullmatch(r"shard-00001: record \d: checksum does not match", str(caught.value))


def test_nothing_to_read(make_run, records):
  with pytest.raises(UserError, match="config.data.records=memory holds no record: export"):
    make_run().batches(type(records)())
  with pytest.raises(UserError, match="holds no conversation"):
    make_run(Conversations()).batches(type(records)())


def test_no_deep_learning_framework_is_imported():
  for package in (lyrics_jax.data, lyrics_jax.tasks):
    for path in pathlib.Path(package.__file__).parent.glob("*.py"):  # Grain itself loads JAX where there is one
      assert not re.search(r"^\s*(import|from) (jax|flax|torch|tensorflow)\b", path.read_text(), re.MULTILINE), path
