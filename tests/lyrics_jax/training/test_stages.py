"""Runs that train other parts than the paper's stages do: all of the language model, an MLP, a projection alone."""

import shutil

import numpy as np
import optax
import pytest
import tiny
from run_output import assert_same_bits, keys_of, losses, mean_loss, saved, steps_of

from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.sharding import MeshSettings
from lyrics_jax.train import train
from lyrics_jax.training.optimizer import Rate

TURNED = ("llm/stack/blocks/q/kernel", "llm/stack/blocks/k/kernel", "llm/stack/blocks/v/kernel")


@pytest.fixture(scope="module")
def full(make_run, tmp_path_factory):
  """The configuration of a finished run of six steps that trained the whole language model on eight devices.

  Fewer heads of keys and values than of queries make the matrices of k and v oblong.
  """
  config = make_run("instruct", tmp_path_factory.mktemp("full") / "run", **tiny.TRAIN["full"], steps=6,
                    checkpoint_every=3, mesh=MeshSettings(1, 4, 2), stage__model__llm__kv_heads=2,
                    stage__model__llm__heads=4, optimizer__rates=(Rate("llm/*", 1e-3),))
  train(config)
  return config


def test_full_fine_tuning_goes_on_with_the_same_bits(full, make_run, tmp_path):
  output = shutil.copytree(full.output, tmp_path / "run")
  shutil.rmtree(output / "checkpoints" / "6")
  config = full.unlocked()
  config.output = str(output)
  config.finalize()
  train(config)
  assert steps_of(output) == steps_of(full.output) == [3, 6]
  assert_same_bits(output, full.output)
  assert losses(output) == losses(full.output)


def test_a_checkpoint_has_every_kernel_with_its_inputs_first(full):
  """The moments of the optimizer too, whatever way the matrices lie in memory."""
  plan = tiny.make_plan(full)
  assert set(TURNED) <= plan.transposed
  parameters, optimizer, frozen = saved(full.output)
  for path, shape in plan.shapes.items():
    assert (parameters | frozen)[path].shape == shape.shape, path
  assert parameters["llm/stack/blocks/q/kernel"].shape == (2, 16, 16)
  assert parameters["llm/stack/blocks/k/kernel"].shape == (2, 16, 8)
  moments = [optax.tree.get(optimizer, name) for name in ("mu", "nu")]
  for moment in moments:
    assert {path: moment[path].shape for path in moment} == {path: parameters[path].shape for path in parameters}
  in_memory, _ = LoadedModel.open(full.output).parameters
  for path in TURNED:
    np.testing.assert_array_equal(in_memory[path], parameters[path].swapaxes(-1, -2))


def frozen_as_drawn(config, frozen) -> bool:
  """Whether the frozen parameters of a run are those it began with, which another process drew."""
  _, drawn = tiny.make_plan(config).initialise(tiny.one_device_mesh(config), config.seed)
  drawn = tiny.make_plan(config).turned(drawn)
  assert drawn.keys() == frozen.keys()
  return all(np.allclose(frozen[path], drawn[path], rtol=1e-6, atol=1e-7) for path in drawn)


def test_an_mlp_in_front_of_a_frozen_language_model(make_run, run_to_end, tmp_path):
  """The first stage of LLaVA: no Q-Former, none of its tokenizers and texts, nothing of the refiner is read."""
  config = make_run("llava", tmp_path / "run", steps=40, checkpoint_every=40)
  assert set(config.fields) == {"image", "ids", "segments", "targets", "slot"}
  assert not config.data.mq_former_tokenizer
  log = run_to_end(config)
  assert "compiling for texts of 160 (segments) tokens" in log
  history, (trained, optimizer, frozen) = losses(config.output), saved(config.output)
  assert mean_loss(history[-5:]) < mean_loss(history[:5]) - 0.1
  expected = {f"connector/linear_{k}/{name}" for k in (1, 2) for name in ("kernel", "bias")}
  assert trained.keys() == expected == keys_of(optimizer) - {"count", "mu", "nu"}
  assert frozen_as_drawn(config, frozen)


def test_a_projection_alone(make_run, run_to_end, tmp_path):
  """The first stage of MiniGPT-4: a Q-Former that is frozen, too."""
  config = make_run("instruct", tmp_path / "run", steps=10, checkpoint_every=10,
                    **tiny.TRAIN["frozen"] | {"stage__train": ("connector/projection/*",)})
  run_to_end(config)
  history, (trained, optimizer, frozen) = losses(config.output), saved(config.output)
  assert mean_loss(history[-3:]) < mean_loss(history[:3])
  expected = {"connector/projection/kernel", "connector/projection/bias"}
  assert trained.keys() == expected == keys_of(optimizer) - {"count", "mu", "nu"}
  assert {"connector/former/queries", "connector/image_norm/scale", "llm/words/embedding"} <= frozen.keys()
  assert frozen_as_drawn(config, frozen)
