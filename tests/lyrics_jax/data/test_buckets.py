import itertools
import json
import math

import numpy as np
import pytest

from lyrics_jax.data import buckets
from lyrics_jax.data.batch import text_masks
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.pairs import Pairs
from refiner_export.common.settings import UserError

SHARES = {"buckets": (0.25, 0.5, 0.6, 0.7, 0.8, 1.0), "caption_length": 48}


@pytest.fixture
def run(make_run, rows):
  return make_run(rows, batch_size=2, **SHARES)


def taken(run, records, count):
  return list(itertools.islice(run.batches(records), count))


def lengths_of(run, batch):
  return buckets.lengths_of(run.fields, run.data.buckets, batch)


def cut(run, batch):
  return buckets.cut_to(lengths_of(run, batch), batch)


def bucket(run, lengths, name, full):
  """Which share of the full length a text field is cut to."""
  return [math.ceil(share * full) for share in run.data.buckets].index(lengths[name])


def test_cutting_loses_no_token_and_no_shorter_bucket_would_do(run, records):
  met = set()
  masks = text_masks(run.fields)
  assert len(masks) == (3 if isinstance(run.data.rows, Conversations) else 2)
  for batch in taken(run, records, 24):
    lengths = lengths_of(run, batch)
    met.add(tuple(lengths.values()))
    short = cut(run, batch)
    for name in masks:
      assert (short[name] > 0).sum() == (batch[name] > 0).sum(), name
    numbers = {name: bucket(run, lengths, name, batch[name].shape[-1]) for name in masks}
    for group in [{"caption_mask"}, {"spatial_mask", "instruction_mask", "segments"}]:
      group = group & numbers.keys()
      assert len({numbers[name] for name in group}) <= 1  # one bucket for all of a group
      number = numbers[next(iter(group))] if group else 0
      if number:
        shorter = {name: math.ceil(run.data.buckets[number - 1] * batch[name].shape[-1]) for name in group}
        assert any(batch[name][..., length:].any() for name, length in shorter.items())
  assert 1 < len(met) <= buckets.most_shapes(run.fields, run.data.buckets)


def test_a_caption_has_a_bucket_of_its_own(make_run):
  run = make_run(**SHARES)

  def lengths(spatial, caption):
    batch = {}
    for name, field in run.fields.items():
      if field.bucket is not None:
        used = caption if field.bucket == "caption" else spatial
        batch[name] = np.broadcast_to(np.arange(field.shape(run.dimensions)[-1]) < used, field.shape(run.dimensions))
    found = lengths_of(run, batch)
    assert set(found) == {
        "spatial_ids", "spatial_mask", "msp_ids", "msp_targets", "caption_ids", "caption_mask", "icg_ids"}
    assert found["spatial_ids"] == found["spatial_mask"] == found["msp_ids"] == found["msp_targets"]
    assert found["caption_ids"] == found["caption_mask"] == found["icg_ids"]
    return found["spatial_ids"], found["caption_ids"]

  assert lengths(150, 9) == (154, 12)  # 0.8 and 0.25
  assert lengths(9, 48) == (48, 48)
  assert buckets.most_shapes(run.fields, run.data.buckets) == 36


def test_the_greatest_lengths_of_several_hosts_hold_the_texts_of_all(run, records):
  batches = taken(run, records, 6)
  of_hosts = [lengths_of(run, batch) for batch in batches]
  assert all(list(lengths) == list(of_hosts[0]) for lengths in of_hosts)  # in one order, so that hosts can compare
  agreed = {name: max(lengths[name] for lengths in of_hosts) for name in of_hosts[0]}
  together = {name: np.concatenate([batch[name] for batch in batches]) for name in agreed}
  assert agreed == lengths_of(run, together)


def test_lengths_of_an_example_are_those_of_a_batch_of_one(run, records):
  batch = taken(run, records, 1)[0]
  of_each = [lengths_of(run, {name: batch[name][row] for name in run.fields}) for row in range(2)]
  assert lengths_of(run, batch) == {name: max(lengths[name] for lengths in of_each) for name in of_each[0]}


def test_lengths_are_the_stated_shares(make_run, records):
  run = make_run(batch_size=2, **SHARES)
  batch = taken(run, records, 1)[0]
  batch["spatial_mask"][..., 48:] = False
  short = cut(run, batch)
  assert short["spatial_ids"].shape[-1] == 48 and short["spatial_mask"].shape[-1] == 48  # a quarter of 192
  assert short["image"] is batch["image"] and short["detection_mask"] is batch["detection_mask"]


def test_every_array_with_a_text_axis_is_cut(run, records):
  batch = taken(run, records, 1)[0]
  for name in text_masks(run.fields):
    batch[name][..., 1:] = 0
  short = cut(run, batch)
  for name, field in run.fields.items():
    if {"spatial", "caption", "conversation"} & set(field.dims):
      assert short[name].shape[:-1] == batch[name].shape[:-1] and short[name].shape[-1] < batch[name].shape[-1], name


def test_a_window_holds_the_same_examples_sorted(make_run, records):
  plain = make_run(Conversations(), batch_size=2, **SHARES | {"buckets": (1.0,)})
  bucketed = make_run(Conversations(), batch_size=2, **SHARES)

  def named(batches):
    return sorted(record for batch in batches for record in batch["records"])

  def spread(batches):
    return np.mean([np.ptp(batch["segments"].sum(1)) for batch in batches])

  unsorted, window = taken(plain, records, buckets.WINDOW), taken(bucketed, records, buckets.WINDOW)
  assert named(window) == named(unsorted)
  longest = [batch["segments"].sum(1).max() for batch in window]
  assert spread(window) < spread(unsorted)
  assert longest != sorted(longest)  # short texts do not always come first


@pytest.mark.parametrize("batches, window", [
    (0, 1), (1, 1), (3, 3), (8, 8), (9, 8), (10, 5), (16, 8), (21, 7), (33, 8)])
def test_a_window_leaves_out_few_batches(batches, window):
  assert buckets.window_of(batches) == window


def test_no_window_crosses_an_epoch(make_run, records):
  """Copies of a picture are equally long, so in one window they would meet in a batch."""
  for batch_size, in_epoch in ((2, 6), (4, 4), (1, 6)):
    run = make_run(Pairs(), batch_size=batch_size, **SHARES)
    batches = taken(run, records, 5 * in_epoch // batch_size)
    names = [record for batch in batches for record in batch["records"]]
    for start in range(0, len(names), in_epoch):
      assert len(set(names[start:start + in_epoch])) == in_epoch
    assert set(names) == {record.id for record in records}  # what an epoch leaves out, another one shows


def test_resume_inside_a_window_is_exact(run, records):
  batches = run.batches(records)
  for _ in range(buckets.WINDOW + 3):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  following = [next(batches) for _ in range(buckets.WINDOW)]
  resumed = run.batches(records)
  resumed.set_state(state)
  for expected in following:
    found = next(resumed)
    assert found["records"] == expected["records"]
    np.testing.assert_array_equal(found["spatial_ids"], expected["spatial_ids"])


@pytest.mark.parametrize("shares", [(), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0), (1.0, 1.0)])
def test_impossible_buckets_name_the_field(make_run, shares):
  message = r"config\.data\.buckets=.* must be ascending shares in \(0, 1\] that end with 1\.0"
  with pytest.raises(UserError, match=message):
    make_run(buckets=shares)
