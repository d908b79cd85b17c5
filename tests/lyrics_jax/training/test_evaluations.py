"""Evaluations while training: when they happen, what they see, where figures go, and that they change nothing."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from run_output import assert_same_bits, losses, saved

from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.train import train
from lyrics_jax.training.evaluations import EvaluationSettings
from refiner_export.common.settings import UserError

BIAS = "connector/linear_2/bias"


@dataclasses.dataclass(unsafe_hash=True)
class Sums(EvaluationSettings):
  """Adds up one trained parameter, on the devices and on the host."""
  name = "sums"

  def build(self, config, fingerprint):
    assert fingerprint == "made-up"

    def total(model) -> jnp.ndarray:
      return model.connector.linear_2.bias[...].sum()

    def measure(loaded: LoadedModel) -> dict[str, float]:
      trained, frozen = loaded.parameters
      assert BIAS in trained and BIAS not in frozen and loaded.config is config
      return {"device": float(loaded.compiled(total)()), "host": float(np.sum(trained[BIAS]))}

    return measure


def test_figures_of_the_model_as_it_is_at_a_step(make_run, tmp_path):
  """Every second step and after the last one; the steps are those of a run without evaluations."""
  changes = {"steps": 5, "checkpoint_every": 5, "optimizer__warmup_fraction": 0.0}
  plain = make_run("llava", tmp_path / "plain", **changes)
  measured = make_run("llava", tmp_path / "measured", evaluations=(Sums(every=2),), **changes)
  train(plain)
  train(measured)
  assert_same_bits(measured.output, plain.output)
  lines = losses(measured.output)
  assert [line["step"] for line in lines if "sums/host" in line] == [2, 4, 5]
  for line in lines:
    device, host = line.pop("sums/device", 0), line.pop("sums/host", 0)
    assert device == pytest.approx(host, rel=1e-4, abs=1e-6)  # float32 sums in another order
  assert lines == losses(plain.output)
  last, _, _ = saved(measured.output)
  assert host == pytest.approx(float(np.sum(last[BIAS])), rel=1e-4, abs=1e-6) and host != 0


def test_figures_need_a_line_to_stand_in(make_run, tmp_path):
  message = r"config.evaluations\[0\].every=3 is not a multiple of config.log_every=2"
  with pytest.raises(UserError, match=message):
    make_run("llava", tmp_path / "run", log_every=2, evaluations=(Sums(every=3),))
