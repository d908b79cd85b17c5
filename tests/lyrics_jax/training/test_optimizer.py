"""The schedule, what decays, clipping; AdamW as PyTorch has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from lyrics_jax.training.optimizer import OptimizerSettings, Rate, learning_rate, make_optimizer
from refiner_export.common.settings import UserError

AXES = {"kernel": ("embed", "mlp"), "stacked/bias": ("mlp",), "scale": (None,), "scalar": ()}
SHAPES = {"kernel": (4, 3), "stacked/bias": (2, 3), "scale": (3,), "scalar": ()}


def values(seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return {path: np.asarray(scale * rng.standard_normal(shape), np.float32) for path, shape in SHAPES.items()}


def test_schedule():
  rate = learning_rate(OptimizerSettings(peak_lr=2e-3, final_lr=1e-4, warmup_fraction=0.15), 200)
  for update, expected in ((1, 2e-3 / 30), (15, 1e-3), (30, 2e-3), (115, (2e-3 + 1e-4) / 2), (200, 1e-4), (300, 1e-4)):
    assert float(rate(update - 1)) == pytest.approx(expected, rel=1e-5, abs=1e-9)  # float32
  without_warmup = learning_rate(OptimizerSettings(peak_lr=2e-3, warmup_fraction=0.0), 200)
  assert float(without_warmup(0)) == pytest.approx(2e-3, rel=1e-3)  # one step down the cosine


def test_only_matrices_decay():
  config = OptimizerSettings(peak_lr=1e-2, warmup_fraction=0.0, weight_decay=0.5)
  optimizer, parameters = make_optimizer(config, 10, AXES), values()
  updates, _ = optimizer.update(jax.tree.map(np.zeros_like, parameters), optimizer.init(parameters), parameters)
  for path, update in updates.items():
    decay = 0.5 if path == "kernel" else 0
    rate = float(learning_rate(config, 10)(0))
    np.testing.assert_allclose(update, -rate * decay * parameters[path], rtol=1e-5)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_biases_norms_and_scalars_do_not_decay(stage):
  plan = tiny.make_plan(tiny.make_config(stage))
  undecayed = {path for path in plan.paths(True) if len(plan.axes[path]) < 2}
  assert undecayed == {path for path in plan.paths(True) if path.split("/")[-1] in ("bias", "scale", "temperature")}


def test_equals_torch_with_clipping():
  """Six steps; the gradients' norm is far above the limit in the first ones, below it in the others."""
  config = OptimizerSettings(peak_lr=1e-2, warmup_fraction=0.5, final_lr=1e-3, weight_decay=0.1, clip_norm=2.0)
  steps, rate = 6, learning_rate(config, 6)
  optimizer, ours = make_optimizer(config, steps, AXES), {path: jnp.asarray(value) for path, value in values().items()}
  state = optimizer.init(ours)
  theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in values().items()}
  adam = torch.optim.AdamW([{"params": [theirs["kernel"]], "weight_decay": 0.1},
                            {"params": [theirs[path] for path in AXES if path != "kernel"], "weight_decay": 0.0}],
                           betas=(config.beta1, config.beta2), eps=1e-8)
  for step in range(steps):
    gradient = values(step + 1, scale=5.0 if step < 3 else 0.1)
    updates, state = optimizer.update(gradient, state, ours)
    ours = jax.tree.map(lambda p, u: p + u, ours, updates)
    for path, parameter in theirs.items():
      parameter.grad = torch.tensor(gradient[path])
    norm = torch.nn.utils.clip_grad_norm_(theirs.values(), config.clip_norm)
    assert (norm > config.clip_norm) == (step < 3)
    for group in adam.param_groups:
      group["lr"] = float(rate(step))
    adam.step()
    for path in AXES:
      # torch divides by norm + 1e-6, optax by norm; and both are float32.
      np.testing.assert_allclose(ours[path], theirs[path].detach().numpy(), rtol=1e-6, atol=1e-6)


def updates_of(*rates: Rate, steps: int = 3) -> dict[str, np.ndarray]:
  """The updates of some steps with the same gradients, added up; gradients are clipped and matrices decay."""
  config = OptimizerSettings(peak_lr=1e-2, warmup_fraction=0.0, weight_decay=0.1, clip_norm=1.0, rates=rates)
  config.finalize()
  optimizer, parameters = make_optimizer(config, 10, AXES), values()
  state, total = optimizer.init(parameters), jax.tree.map(np.zeros_like, parameters)
  for step in range(steps):
    updates, state = optimizer.update(values(step + 1), state, parameters)
    total = jax.tree.map(lambda so_far, update: so_far + np.asarray(update), total, updates)
  return total


def test_a_rate_of_its_own_scales_the_update():
  """Exactly: the moments, the clipped norm and the decay are the same, and 4 and 1/2 are powers of two."""
  common, scaled = updates_of(), updates_of(Rate("stacked/*", 4e-2), Rate("s*", 5e-3))
  for path, factor in {"kernel": 1, "stacked/bias": 4, "scale": 0.5, "scalar": 0.5}.items():
    assert np.abs(common[path]).max() > 0
    np.testing.assert_array_equal(scaled[path], factor * common[path], err_msg=path)


def test_a_run_may_go_on_with_other_rates():
  """A checkpoint fits: rates have no state."""
  plain = make_optimizer(OptimizerSettings(), 10, AXES)
  with_rates = make_optimizer(OptimizerSettings(rates=(Rate("kernel", 1e-3),)), 10, AXES)
  assert jax.tree.structure(plain.init(values())) == jax.tree.structure(with_rates.init(values()))


@pytest.mark.parametrize("pattern", ["connector/projecton/*", "vision/*", "Connector/*"])
def test_a_rate_for_no_trained_parameter(pattern):
  """Nothing has this name; it is frozen; small and capital letters differ."""
  plan = tiny.make_plan(tiny.make_config("instruct", optimizer__rates=(Rate("connector/*", 1e-3), Rate(pattern, 1e-4))))
  trained, _ = plan.split(plan.axes)
  with pytest.raises(UserError, match=r"^config.optimizer.rates\[1\].pattern='.*' matches no trained parameter.*$"):
    make_optimizer(plan.config.optimizer, 10, trained)


def test_a_rate_of_zero_is_no_freezing():
  with pytest.raises(UserError, match=r"config.optimizer.rates\[0\].peak_lr=0.0 must be positive; to freeze, "):
    tiny.make_config("instruct", optimizer__rates=(Rate("connector/*", 0.0),))
