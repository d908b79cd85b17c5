"""Runs that train other parts than the paper's stages do: all of the language model, an MLP, a projection alone."""

import logging
import pathlib
import shutil

import jax
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

  One head of keys and values makes the matrices of k and v oblong.
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
