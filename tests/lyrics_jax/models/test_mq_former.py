"""The MQ-Former and the four losses of stage 1 against a plain reference that shares nothing with them."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from reference import Reference

from lyrics_jax.models import visibility
from lyrics_jax.models.inputs import Pictures, merge_pictures, spatial_and_caption
from lyrics_jax.objectives.itm import hard_negatives, no_negatives

VARIANTS = [  # cross-attention frequency, activation, whether the caption's positions restart
    (2, "relu", True), (1, "gelu", False),
    *(pytest.param(variant, marks=pytest.mark.slow) for variant in ((2, "gelu", False), (1, "relu", True)))]


def name_of(variant):
  return f"frequency{variant[0]}-{variant[1]}-{'restart' if variant[2] else 'continue'}"


@pytest.fixture(scope="module", params=VARIANTS, ids=name_of)
def case(request):
  """What the package computes, jitted at once, and the reference of the same parameters and batch."""
  frequency, activation, restart = request.param
  config = tiny.make_config(stage__model__connector__former__layers=4 if frequency == 2 else 2, batch_size=4,
                            stage__model__connector__former__cross_attention_frequency=frequency,
                            stage__model__connector__former__activation=activation,
                            stage__model__connector__former__restart_positions=restart)
  plan = tiny.make_plan(config)
  trained, frozen = tiny.make_parameters(plan, spread=0.2)
  batch = tiny.make_batch(config)
  batch["detection_mask"][0], batch["masks_mask"][0] = False, False  # a picture without any local token

  def compute(trained, frozen, batch):
    model = plan.model(trained, frozen)
    former = model.connector.former
    spatial = merge_pictures(batch["spatial_ids"]), merge_pictures(batch["spatial_mask"])
    caption = batch["caption_ids"], batch["caption_mask"]
    both = spatial_and_caption(spatial, caption, restart)
    icg = spatial_and_caption(None, (batch["icg_ids"], batch["caption_mask"]), restart)
    msp = spatial_and_caption((merge_pictures(batch["msp_ids"]), spatial[1]), None, restart)
    features = model.see(Pictures.of(batch))
    pictures = model.key_values(features)
    queries, context = model.encode_queries(pictures)
    texts, similarity = model.encode_texts(both), {}
    for pooling in ("mean", "max"):
      model.settings = dataclasses.replace(model.settings, itc_pooling=pooling)
      similarity[pooling] = model.similarity(model.encode_images(queries), texts)
    model.settings = config.stage.model
    return {
        "image_tokens": model.connector.image_norm(features.image),
        "queries": queries,
        "itc_text": former.text_pass(both, visibility.ITC, None),
        "icg_text": former.text_pass(icg, visibility.ICG, context),
        "msp_text": former.text_pass(msp, visibility.MSP, context),
        "itm": former.joint_pass(pictures, both, visibility.ITM),
        "instruct": former.joint_pass(pictures, both, visibility.INSTRUCT),
        "similarity": similarity,
        "negatives": hard_negatives(similarity["mean"], no_negatives(batch), jax.random.key(0)),
        "losses": config.stage.loss(model, batch),
    }

  got = jax.device_get(jax.jit(compute)(trained, frozen, batch))
  parameters = tiny.numpy(trained | frozen)
  reference = Reference(parameters, config, got["image_tokens"].astype(np.float64), batch)
  return got, reference, reference.batch


def close(got, expected, valid=None):
  """1e-5: float32 against float64 after 2 to 4 layers of outputs of size 1."""
  got, expected = (np.asarray(a)[valid] if valid is not None else np.asarray(a) for a in (got, expected))
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_contrastive_pass(case):
  got, reference, batch = case
  queries, spatial, caption = reference.run("itc", reference.spatial, reference.caption)
  close(got["queries"], queries)
  valid = np.concatenate([batch["spatial_mask"], batch["caption_mask"]], axis=1)
  close(got["itc_text"], np.concatenate([spatial, caption], axis=1), valid)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_similarity(case, pooling):
  got, reference, _ = case
  # The temperature magnifies errors 14 times.
  np.testing.assert_allclose(got["similarity"][pooling], reference.similarity(pooling), atol=1e-4)


def test_generation_and_prediction_reuse_the_queries(case):
  got, reference, batch = case
  generated = batch["icg_ids"], batch["caption_mask"]
  queries, _, caption = reference.run("icg", reference.absent(reference.spatial), generated)
  close(got["queries"], queries)
  close(got["icg_text"], caption, batch["caption_mask"])
  predicted = batch["msp_ids"], batch["spatial_mask"]
  queries, spatial, _ = reference.run("msp", predicted, reference.absent(reference.caption))
  close(got["queries"], queries)
  close(got["msp_text"], spatial, batch["spatial_mask"])


@pytest.mark.parametrize("objective", ["itm", "instruct"])
def test_joint_passes(case, objective):
  got, reference, batch = case
  queries, spatial, caption = reference.run(objective, reference.spatial, reference.caption)
  close(got[objective][0], queries)
  valid = np.concatenate([batch["spatial_mask"], batch["caption_mask"]], axis=1)
  close(got[objective][1], np.concatenate([spatial, caption], axis=1), valid)


@pytest.mark.parametrize("loss", ["itc", "itm", "icg", "msp"])
def test_losses(case, loss):
  got, reference, _ = case
  pictures, texts, found = got["negatives"]
  assert found.all() and (pictures != np.arange(4)).all() and (texts != np.arange(4)).all()
  expected = reference.itm(pictures, texts) if loss == "itm" else getattr(reference, loss)()
  # 1e-4: ITC divides float32 errors of 1e-6 by the temperature, 0.07.
  assert float(got["losses"].metrics[loss]) == pytest.approx(expected, abs=1e-4)


def test_the_total_is_the_sum(case):
  got, _, _ = case
  metrics = got["losses"].metrics
  total = sum(float(metrics[name]) for name in ("itc", "itm", "icg", "msp"))
  assert float(got["losses"].value) == pytest.approx(total, rel=1e-6)
