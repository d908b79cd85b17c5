import itertools
import json

import numpy as np
import pytest

from lyrics_jax.data import buckets
from lyrics_jax.data.loader import train_batches
from refiner_export.settings import UserError

SHARES = {"buckets": (0.25, 0.5, 0.6, 0.7, 0.8, 1.0), "caption_length": 48}


@pytest.fixture(scope="module", params=["align", "instruct"])
def config(make_config, request):
  return make_config(stage=request.param, batch_size=2, data=SHARES)


def taken(config, records, count):
  return list(itertools.islice(train_batches(config, records), count))


def test_cutting_loses_no_token_and_no_shorter_bucket_would_do(config, records):
  met = set()
  for batch in taken(config, records, 24):
    bucket = buckets.bucket_of(config.data, batch)
    met.add(bucket)
    short = buckets.cut(config.data, batch, bucket)
    for name, value in batch.items():
      if name.endswith("_mask"):
        assert short[name].sum() == value.sum(), name
    if bucket:
      shorter = buckets.cut(config.data, batch, bucket - 1)
      assert any(shorter[name].sum() < batch[name].sum() for name in batch if name.endswith("_mask"))
  assert len(met) > 1


def test_lengths_are_the_stated_shares(config, records):
  batch = taken(config, records, 1)[0]
  short = buckets.cut(config.data, batch, 0)
  assert short["spatial_ids"].shape[1] == 48 and short["spatial_mask"].shape[1] == 48  # a quarter of 192
  assert short["image"] is batch["image"] and short["detection_mask"] is batch["detection_mask"]


def test_every_array_with_a_text_axis_is_cut(config, records):
  batch = taken(config, records, 1)[0]
  lengths = (config.data.spatial_length, config.data.caption_length, config.data.llm_length)
  short = buckets.cut(config.data, batch, 0)
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
