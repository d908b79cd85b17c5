import itertools
import json
import math

import numpy as np
import pytest

from lyrics_jax.data import buckets
from lyrics_jax.data.loader import train_batches
from refiner_export.common.settings import UserError

SHARES = {"buckets": (0.25, 0.5, 0.6, 0.7, 0.8, 1.0), "caption_length": 48}


@pytest.fixture(scope="module", params=["align", "instruct"])
def config(make_config, request):
  return make_config(stage=request.param, batch_size=2, data=SHARES)


def taken(config, records, count):
  return list(itertools.islice(train_batches(config, records), count))


def cut(config, batch):
  return buckets.cut_to(buckets.lengths_of(config.data, batch), batch)


def bucket(config, lengths, name, full):
  """Which share of the full length a text array is cut to."""
  return [math.ceil(share * full) for share in config.data.buckets].index(lengths[name])


def test_cutting_loses_no_token_and_no_shorter_bucket_would_do(config, records):
  met = set()
  for batch in taken(config, records, 24):
    lengths = buckets.lengths_of(config.data, batch)
    met.add(tuple(lengths.values()))
    short = cut(config, batch)
    masks = [name for name in batch if name in lengths and name.endswith("_mask")]
    assert len(masks) == (2 if config.stage == "align" else 3)
    for name in masks:
      assert short[name].sum() == batch[name].sum(), name
    numbers = {name: bucket(config, lengths, name, batch[name].shape[1]) for name in masks}
    for group in [{"caption_mask"}, {"spatial_mask", "instruction_mask", "llm_mask"}]:
      group = group & numbers.keys()
      assert len({numbers[name] for name in group}) <= 1  # one bucket for all of a group
      number = numbers[next(iter(group))] if group else 0
      if number:
        shorter = {name: math.ceil(config.data.buckets[number - 1] * batch[name].shape[1]) for name in group}
        assert any(batch[name][:, length:].any() for name, length in shorter.items())
  assert 1 < len(met) <= buckets.most_shapes(config.data, lengths)


def test_a_caption_has_a_bucket_of_its_own(make_config):
  data = make_config(data=SHARES).data
  mask = lambda used, length: np.arange(length)[None] < used
  texts = lambda spatial, caption: {"spatial_mask": mask(spatial, 192), "spatial_ids": np.zeros((1, 192)),
                                    "caption_mask": mask(caption, 48), "icg_ids": np.zeros((1, 48))}
  lengths = buckets.lengths_of(data, texts(150, 9))
  assert lengths == {"spatial_mask": 154, "spatial_ids": 154, "caption_mask": 12, "icg_ids": 12}  # 0.8 and 0.25
  assert buckets.lengths_of(data, texts(9, 48)) == {"spatial_mask": 48, "spatial_ids": 48, "caption_mask": 48, "icg_ids": 48}
  assert buckets.most_shapes(data, lengths) == 36


def test_the_greatest_lengths_of_several_hosts_hold_the_texts_of_all(config, records):
  batches = taken(config, records, 6)
  of_hosts = [buckets.lengths_of(config.data, batch) for batch in batches]
  assert all(list(lengths) == list(of_hosts[0]) for lengths in of_hosts)  # in one order, so that hosts can compare
  agreed = {name: max(lengths[name] for lengths in of_hosts) for name in of_hosts[0]}
  together = {name: np.concatenate([batch[name] for batch in batches]) for name in agreed}
  assert agreed == buckets.lengths_of(config.data, together)


def test_lengths_are_the_stated_shares(make_config, records):
  config = make_config(batch_size=2, data=SHARES)
  batch = taken(config, records, 1)[0]
  batch["spatial_mask"][:, 48:] = False
  short = cut(config, batch)
  assert short["spatial_ids"].shape[1] == 48 and short["spatial_mask"].shape[1] == 48  # a quarter of 192
  assert short["image"] is batch["image"] and short["detection_mask"] is batch["detection_mask"]


def test_every_array_with_a_text_axis_is_cut(config, records):
  batch = taken(config, records, 1)[0]
  for name in ("spatial_mask", "caption_mask", "instruction_mask", "llm_mask"):
    if name in batch:
      batch[name][:, 1:] = False
  lengths = (config.data.spatial_length, config.data.caption_length, config.data.llm_length)
  short = cut(config, batch)
  for name, value in batch.items():
    if name != "ids" and value.ndim == 2 and value.shape[1] in lengths:
      assert short[name].shape[1] < value.shape[1], name


def test_a_window_holds_the_same_examples_sorted(make_config, records):
  plain = make_config(stage="instruct", batch_size=2, data=SHARES | {"buckets": (1.0,)})
  bucketed = make_config(stage="instruct", batch_size=2, data=SHARES)
  name = lambda batch: [(record, ids.tobytes()) for record, ids in zip(batch["ids"], batch["llm_ids"])]
  expected = sorted(itertools.chain(*map(name, taken(plain, records, buckets.WINDOW))))
  window = taken(bucketed, records, buckets.WINDOW)
  assert sorted(itertools.chain(*map(name, window))) == expected
  longest = [batch["llm_mask"].sum(1).max() for batch in window]
  spread = lambda batches: np.mean([np.ptp(batch["llm_mask"].sum(1)) for batch in batches])
  assert spread(window) < spread(taken(plain, records, buckets.WINDOW))
  assert longest != sorted(longest)  # short texts do not always come first


def test_resume_inside_a_window_is_exact(config, records):
  batches = train_batches(config, records)
  for _ in range(buckets.WINDOW + 3):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  following = [next(batches) for _ in range(buckets.WINDOW)]
  resumed = train_batches(config, records)
  resumed.set_state(state)
  for expected in following:
    found = next(resumed)
    assert found["ids"] == expected["ids"]
    np.testing.assert_array_equal(found["spatial_ids"], expected["spatial_ids"])


@pytest.mark.parametrize("shares", [(), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0), (1.0, 1.0)])
def test_impossible_buckets_name_the_field(make_config, shares):
  with pytest.raises(UserError, match=r"config\.data\.buckets=.* must be ascending shares in \(0, 1\] that end with 1\.0"):
    make_config(data={"buckets": shares})
