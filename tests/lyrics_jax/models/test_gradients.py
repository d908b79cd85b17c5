"""Gradients of the four losses against finite differences of the float64 reference, along random directions."""

import jax
import numpy as np
import pytest
import tiny
from reference import Reference

from lyrics_jax.objectives.itm import hard_negatives, no_negatives

STEP = 1e-5  # central differences in float64: error about STEP^2 of truncation and 1e-16 / STEP of rounding


@pytest.fixture(scope="module")
def case():
  """Per loss the package's float32 gradient, and a function from float64 parameters to the reference's four losses."""
  # relu has kinks, which differences may cross.
  config = tiny.make_config(batch_size=3, stage__model__connector__former__activation="gelu")
  plan = tiny.make_plan(config)
  trained, frozen = tiny.make_parameters(plan, spread=0.2)
  batch = tiny.make_batch(config)

  def losses(trained):
    return plan.config.stage.loss(plan.model(trained, frozen), batch, None).metrics

  def fixed(trained):
    passes = plan.model(trained, frozen).passes(batch)
    negatives = hard_negatives(passes.similarity, no_negatives(batch), jax.random.key(0))
    return passes.features.image, negatives

  gradients = jax.device_get(jax.jit(jax.jacrev(losses))(trained))
  image_tokens, (pictures, texts, _) = jax.device_get(jax.jit(fixed)(trained))
  others = {path: np.asarray(value, np.float64) for path, value in frozen.items()}

  def expected(trained):
    p = trained | others
    norm = p["connector/image_norm/scale"], p["connector/image_norm/bias"]
    x = image_tokens.astype(np.float64)
    deviation = np.sqrt(x.var(-1, keepdims=True) + config.stage.model.vision.norm_eps)
    x = (x - x.mean(-1, keepdims=True)) / deviation * norm[0] + norm[1]
    reference = Reference(p, config, x, batch)
    return {"itc": reference.itc(), "itm": reference.itm(pictures, texts), "icg": reference.icg(),
            "msp": reference.msp()}

  return {path: np.asarray(value, np.float64) for path, value in trained.items()}, gradients, expected


def test_gradients_equal_finite_differences(case):
  trained, gradients, expected = case
  rng = np.random.default_rng(0)
  for _ in range(6):
    direction = {path: rng.standard_normal(value.shape) for path, value in trained.items()}
    moved = lambda sign: expected({path: value + sign * STEP * direction[path] for path, value in trained.items()})
    ahead, behind = moved(+1), moved(-1)
    for loss in ("itc", "itm", "icg", "msp"):
      slope = sum(float((gradients[loss][path] * direction[path]).sum()) for path in trained)
      size = np.sqrt(sum(float((gradients[loss][path] ** 2).sum()) for path in trained))
      # float32 gradients: 1e-4 of the gradient's length, which a random direction meets with a slope of that order.
      assert slope == pytest.approx((ahead[loss] - behind[loss]) / (2 * STEP), abs=1e-4 * size), loss
