"""Stage 1: what its losses start from, what they depend on, and the hard negatives."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
import torch

from lyrics_jax.models.inputs import Text
from lyrics_jax.models.visibility import S
from lyrics_jax.objectives.itc import ITC, contrastive_loss
from lyrics_jax.objectives.itm import ITM, hard_negatives
from lyrics_jax.objectives.next_token import NextToken
from refiner_export.common.settings import UserError

LOSSES = ("itc", "itm", "icg", "msp")


@pytest.fixture(scope="module")
def fresh(align):
  """Losses of freshly initialised parameters, with a temperature that makes features tell nothing."""
  parameters = tiny.make_parameters(align.plan)[0] | align.frozen | {"temperature": jnp.float32(100)}
  return align.loss(parameters, tiny.make_batch(align.plan.config)).metrics


def test_fresh_losses_are_those_of_knowing_nothing(fresh):
  # The tied embedding begins with deviation 0.02: logits of deviation 0.02 * sqrt(16) = 0.08 add 0.08^2 / 2 to ln V.
  assert float(fresh["icg"]) == pytest.approx(math.log(tiny.VOCABULARY), abs=0.05)
  assert float(fresh["msp"]) == pytest.approx(math.log(tiny.VOCABULARY), abs=0.05)
  assert float(fresh["itc"]) == pytest.approx(math.log(8), abs=0.02)  # similarities within 1 / 100 of zero
  assert math.log(2) / 2 < float(fresh["itm"]) < math.log(2) * 2  # one positive, two negatives, each ln 2 on average


def test_blank_heads_are_exactly_at_chance(align):
  heads = "itc_image/kernel", "itc_text/kernel", "itm/", "lm_head/norm/", "lm_head/bias"
  blank = {}
  for path, value in align.parameters.items():
    blank[path] = jnp.zeros_like(value) if path.startswith(heads) else value
  metrics = align.loss(blank, tiny.make_batch(align.plan.config)).metrics
  chance = {"itc": math.log(8), "itm": math.log(2), "icg": math.log(tiny.VOCABULARY), "msp": math.log(tiny.VOCABULARY)}
  for name, value in chance.items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name  # float32


def test_matched_features_leave_the_smoothing_only():
  similarity = jnp.eye(8) * 50
  assert float(contrastive_loss(similarity, 0.0)) == pytest.approx(0, abs=1e-6)
  assert float(contrastive_loss(similarity, 0.1)) == pytest.approx(0.1 * 7 / 8 * 50, rel=1e-5)


def test_padding_changes_nothing(align, compiled):
  """Neither longer texts nor more rows of padding, nor what the padding holds."""
  config = align.plan.config
  longer = compiled("align", data__spatial_length=15, data__caption_length=12,
                    stage__model__connector__local__detection_rows=6, stage__model__connector__local__mask_rows=7)
  batch = tiny.make_batch(config)
  padded = tiny.pad_batch(batch, longer.plan.config)
  before, after = align.loss(align.parameters, batch).metrics, longer.loss(align.parameters, padded).metrics
  for name in LOSSES:
    # float32, in another order of summation.
    assert float(after[name]) == pytest.approx(float(before[name]), rel=1e-5, abs=1e-5), name


def test_queries_do_not_see_the_text(align):
  """Other captions or objects: the same picture features; MSP knows no caption, ICG no objects."""
  config = align.plan.config
  batch, other = tiny.make_batch(config), tiny.make_batch(config, seed=5)

  @jax.jit
  def features(parameters, batch):
    model = align.plan.model(*align.plan.split(parameters))
    return model.passes(batch).images

  picture = {name: batch[name] for name in ("image", "detection", "detection_mask", "masks", "masks_mask")}
  assert features(align.parameters, picture).shape == (8, 1, 8)  # computed without any text at all
  losses = align.loss(align.parameters, batch).metrics
  changed = []
  for names in (("caption_ids", "caption_mask", "icg_ids"), ("spatial_ids", "spatial_mask", "msp_ids", "msp_targets")):
    changed.append(align.loss(align.parameters, batch | {name: other[name] for name in names}).metrics)
  captions, spatial = changed
  assert captions["msp"] == losses["msp"] and captions["icg"] != losses["icg"] and captions["itc"] != losses["itc"]
  assert spatial["icg"] == losses["icg"] and spatial["msp"] != losses["msp"] and spatial["itc"] != losses["itc"]


def test_generation_does_not_see_the_future(align):
  """Another last word changes the loss of the last word alone: with it left out of the targets, nothing."""
  batch = tiny.make_batch(align.plan.config)
  batch["caption_mask"] = np.ones_like(batch["caption_mask"])
  cut = batch | {"caption_mask": batch["caption_mask"].copy(), "icg_ids": batch["icg_ids"].copy()}
  cut["caption_mask"][:, -1] = False
  before = align.loss(align.parameters, cut).metrics["icg"]
  cut["icg_ids"][:, -1] = tiny.WORDS
  assert align.loss(align.parameters, cut).metrics["icg"] == before


@pytest.mark.parametrize("changes, message", [
    ({"stage__model__connector__former__grounding_queries": 0},
     "config.stage.model.connector.former.grounding_queries=0: the heads of ITC and ITM read grounding queries"),
    ({"batch_size": 1}, "config.batch_size=1: contrastive learning needs at least 2 pairs per microbatch"),
    ({"stage__objectives": (ITC(), NextToken())},
     r"config.stage.objectives\[1\]=NextToken needs a model of VLMSettings, config.stage.model is AlignerSettings"),
    ({"stage__objectives": (ITC(), ITC(weight=2.0))}, r"config.stage.objectives\[1\]: itc stands there twice"),
    ({"stage__objectives": ()}, "config.stage.objectives is empty"),
])
def test_an_impossible_stage_fails_at_the_start(changes, message):
  with pytest.raises(UserError, match=message):
    tiny.make_config("align", **changes)


def test_weights_are_factors_and_objectives_may_be_left_out(align, compiled):
  batch = tiny.make_batch(align.plan.config)
  metrics = align.loss(align.parameters, batch).metrics
  some = compiled("align", stage__objectives=(ITC(weight=2.0), ITM(weight=0.5)))
  loss = some.loss(align.parameters, {name: batch[name] for name in some.plan.config.fields})
  assert set(loss.metrics) == {"itc", "itm", "temperature"} and "msp_ids" not in some.plan.config.fields
  assert float(loss.value) == pytest.approx(2 * float(metrics["itc"]) + 0.5 * float(metrics["itm"]), rel=1e-5)


# --- a picture that stands in several rows, and a text without objects ---

def test_a_picture_is_no_negative_of_itself():
  """ITC: all texts of a picture are right for it, each with an equal share; against torch's cross-entropy."""
  similarity = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) * 3
  same = np.eye(4, dtype=bool)
  same[0, 2] = same[2, 0] = True
  targets = torch.tensor(same / same.sum(1, keepdims=True))
  for smoothing in (0.0, 0.1):
    expected = 0
    for logits in (similarity, similarity.T):
      expected += torch.nn.functional.cross_entropy(torch.tensor(logits), targets, label_smoothing=smoothing) / 2
    got = contrastive_loss(jnp.asarray(similarity), smoothing, jnp.asarray(same))
    assert float(got) == pytest.approx(float(expected), rel=1e-5)  # float32 against float64 targets


def test_copies_are_barred_from_itm(align):
  """With one picture in all rows there is no negative: only the positives count, whatever the captions say."""
  batch = tiny.make_batch(align.plan.config)
  batch["picture_id"] = np.zeros_like(batch["picture_id"])
  certain = {"itm/kernel": jnp.zeros_like(align.parameters["itm/kernel"]), "itm/bias": jnp.array([-20.0, 20.0])}
  assert float(align.loss(align.parameters | certain, batch).metrics["itm"]) == pytest.approx(0, abs=1e-6)


def test_the_grounding_half_leaves_out_texts_without_objects():
  """L_itm by a loop over pairs, on made-up logits: rows of G count where their text names an object."""
  rows, objects = 4, np.array([True, False, True, False])
  logits = np.random.default_rng(0).standard_normal((2, 3 * rows, 2)).astype(np.float32)
  spatial = np.stack([np.ones(rows, bool), objects, objects], axis=1)  # [BOS] alone, or two more tokens
  text = Text(jnp.zeros((rows, 3), jnp.int32), jnp.asarray(spatial), jnp.zeros((rows, 3), jnp.int32), (S, S, S))
  batch = {"picture_id": jnp.arange(rows)[:, None], "caption_ids": jnp.arange(rows)[:, None]}
  pictures = types.SimpleNamespace(take=lambda negatives: None, matching=lambda negative: None)
  model = types.SimpleNamespace(match=lambda pictures, triples, key: jnp.asarray(logits))
  passes = types.SimpleNamespace(similarity=jnp.zeros((rows, rows)), batch=batch, key=lambda stream: None, text=text,
                                 key_values=pictures, model=model)
  _, negative_texts, _ = hard_negatives(passes.similarity, jnp.eye(rows, dtype=bool), jax.random.key(0))

  log_p = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
  halves = [[], []]
  for pair in range(rows):
    for place, text_of in enumerate((pair, int(negative_texts[pair]), pair)):
      row = 3 * pair + place
      halves[0].append(-log_p[0, row, int(place == 0)])
      if objects[text_of]:
        halves[1].append(-log_p[1, row, int(place == 0)])
  assert 0 < len(halves[1]) < 3 * rows
  assert float(ITM()(passes).value) == pytest.approx(np.mean([np.mean(half) for half in halves]), rel=1e-5)


# --- hard negatives ---

SIMILARITY = jnp.asarray(np.random.default_rng(0).standard_normal((6, 6)) * 1.5, jnp.float32)
CAPTIONS = jnp.asarray([[1, 2], [3, 4], [1, 2], [5, 6], [7, 8], [9, 9]])  # pairs 0 and 2 share a caption
DRAWS = 4000


def draw(captions=CAPTIONS, similarity=SIMILARITY, blocks=1):
  keys = jax.random.split(jax.random.key(0), DRAWS)
  barred = (captions[:, None] == captions[None]).all(-1)
  pictures, texts, found = jax.vmap(lambda key: hard_negatives(similarity, barred, key, blocks))(keys)
  return np.asarray(pictures), np.asarray(texts), np.asarray(found)


def test_negatives_are_drawn_by_the_softmax_of_similarity():
  pictures, texts, found = draw()
  assert found.all()
  same = np.asarray((CAPTIONS[:, None] == CAPTIONS[None]).all(-1))
  for pair in range(6):
    for drawn, row in ((texts[:, pair], SIMILARITY[pair]), (pictures[:, pair], SIMILARITY[:, pair])):
      weights = np.where(same[pair], 0, np.exp(np.asarray(row, np.float64)))
      counts = np.bincount(drawn, minlength=6)
      assert not counts[same[pair]].any()  # never the pair itself, nor the other one with its caption
      allowed = ~same[pair]
      expected = weights[allowed] / weights.sum() * DRAWS
      assert scipy.stats.chisquare(counts[allowed], expected).pvalue > 1e-3 / 12  # twelve such tests, one fixed seed


def test_local_negatives_stay_in_their_block():
  pictures, texts, found = draw(blocks=2)
  assert found.all() and ((pictures // 3) == np.arange(6) // 3).all() and ((texts // 3) == np.arange(6) // 3).all()
  assert (pictures != np.arange(6)).all() and (texts != np.arange(6)).all()
  assert set(texts[:, 0]) == {1}  # of block 0, 1, 2 the last has the same caption
  _, _, found = draw(blocks=6)
  assert not found.any()


def test_pictures_and_texts_are_drawn_apart():
  pictures, texts, _ = draw(captions=jnp.arange(6)[:, None], similarity=jnp.zeros((6, 6)))
  assert abs((pictures == texts).mean() - 1 / 5) < 0.02  # two independent draws of five: six standard deviations


def test_without_candidates_only_the_positive_counts(align):
  _, _, found = draw(captions=jnp.ones((6, 2), jnp.int32))
  assert not found.any()
  batch = tiny.make_batch(align.plan.config)
  for name in ("caption_ids", "caption_mask", "icg_ids"):
    batch[name] = np.repeat(batch[name][:1], 8, axis=0)
  loss = align.loss(align.parameters, batch)
  assert all(np.isfinite(float(value)) for value in loss.metrics.values())
  # A classifier that always says "match" is right about all that is left.
  certain = {path: jnp.zeros_like(value) for path, value in align.parameters.items() if path == "itm/kernel"}
  certain["itm/bias"] = jnp.array([-20.0, 20.0])
  assert float(align.loss(align.parameters | certain, batch).metrics["itm"]) == pytest.approx(0, abs=1e-6)
