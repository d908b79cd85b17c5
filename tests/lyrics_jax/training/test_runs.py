"""Whole runs: stopped and continued, refused, broken off, and one stage begun from the other."""

import json
import math
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import tiny
from run_output import assert_same_bits, keys_of, losses, mean_loss, saved, steps_of

from lyrics_jax.sharding import MeshSettings, make_mesh
from lyrics_jax.train import train
from lyrics_jax.training.checkpoint import Checkpoints, open_run
from lyrics_jax.training.initialise import initial_parameters
from lyrics_jax.training import metrics
from lyrics_jax.training.optimizer import Rate
from lyrics_jax.weights.sources import find
from refiner_export.common.settings import UserError


PERCEPTION, PROJECTION = ("vision/", "connector/"), "connector/projection/"


def stop(process, output, signal_number, after):
  """Sends the signal when a checkpoint beyond step `after` is there; returns the exit code."""
  while not any(step > after for step in steps_of(output)):
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.005)
  process.send_signal(signal_number)
  process.communicate(timeout=120)
  return process.returncode


def test_a_stopped_run_ends_like_one_that_was_not(make_run, start, run_to_end, finished, tmp_path):
  """Killed, preempted, continued: the same bits as a run that nothing interrupted."""
  config = make_run("align", tmp_path / "run", steps=40, checkpoint_every=4)
  assert stop(start(config), config.output, signal.SIGKILL, after=3) == -signal.SIGKILL
  killed = steps_of(config.output)[-1]
  assert 4 <= killed < 40
  assert stop(start(config), config.output, signal.SIGTERM, after=killed) == 0
  preempted = steps_of(config.output)[-1]
  assert killed < preempted < 40 and losses(config.output)[-1]["step"] == preempted  # nothing done was lost
  assert f"continuing from step {preempted} of" in run_to_end(config)
  assert steps_of(config.output)[-1] == 40

  assert_same_bits(config.output, finished)
  assert losses(config.output) == losses(finished)
  assert [line["step"] for line in losses(finished)] == list(range(1, 41))


def test_training_lowers_the_loss(finished):
  history = losses(finished)
  assert mean_loss(history[-5:]) < mean_loss(history[:5]) - 0.5


def test_every_step_has_its_rates(finished):
  """The last one too, which is written without waiting for another."""
  assert all(line["images_per_second"] > 0 and line["tokens_per_second"] > 0 for line in metrics.read(str(finished)))


def test_frozen_parameters_are_saved_once(finished, make_run):
  plan = tiny.make_plan(make_run("align", "unused"))
  parameters, optimizer, frozen = saved(finished)
  assert parameters.keys() == set(plan.paths(True)) and frozen.keys() == set(plan.paths(False))
  assert set(plan.paths(True)) == keys_of(optimizer) - {"count", "mu", "nu"}
  trained, fresh = map(plan.turned, plan.initialise(tiny.one_device_mesh(plan.config), 0))
  for path, value in frozen.items():  # untouched by forty steps; drawn in another process
    np.testing.assert_allclose(value, fresh[path], rtol=1e-6, atol=1e-7, err_msg=path)
  assert any(not np.allclose(parameters[path], trained[path]) for path in parameters)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 1), marks=pytest.mark.slow)])
def test_stage_2_begins_with_the_perception_of_stage_1(finished, make_run, tmp_path, sizes):
  plan = tiny.make_plan(make_run("instruct", tmp_path / "run", mesh=MeshSettings(*sizes)))
  mesh = make_mesh(plan.config.mesh, jax.devices()[:math.prod(sizes)])
  checkpoints = Checkpoints(plan.config.output)
  trained, frozen = initial_parameters(plan, mesh, checkpoints, find(str(finished), plan))
  checkpoints.close()
  now = plan.turned(trained | frozen)
  earlier, _, earlier_frozen = saved(finished)
  earlier |= earlier_frozen
  shared = now.keys() & earlier.keys()
  assert {path for path in now if path.startswith(PERCEPTION) and not path.startswith(PROJECTION)} == shared
  for path in shared:
    np.testing.assert_array_equal(now[path], earlier[path], err_msg=path)


def test_a_run_that_is_complete_does_nothing(finished, make_run, tmp_path):
  output = shutil.copytree(finished, tmp_path / "run")
  train(make_run("align", output, steps=40, checkpoint_every=4))  # here on eight devices
  assert steps_of(output) == steps_of(finished) and losses(output) == losses(finished)


# --- what is refused, in one line each ---

def refused(config, message):
  with pytest.raises(UserError, match=message) as caught:
    train(config)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, message", [
    ({"data__records": "nowhere"}, r"no manifest.json in nowhere: run python -m refiner_export"),
    ({"data__mq_former_tokenizer": "nowhere"}, r"MQ-Former tokenizer: no such directory: nowhere"),
    ({"data__fingerprint": "another"}, r"made by refiner made-up \(none\), the configuration expects another"),
    ({"stage__model__connector__former__vocab_size": 100},
     r"config.stage.model.connector.former.vocab_size=100 is too small"),
    ({"init_from": "nowhere"}, r"config.init_from not found: nowhere"),
    ({"optimizer__rates": (Rate("projecton/*", 1e-3),)},
     r"config.optimizer.rates\[0\].pattern='projecton/\*' matches no trained parameter"),
    ({"mesh": MeshSettings(3, 1, 1)}, r"config.mesh: .* does not give the 8 devices"),
    ({"batch_size": 12}, r"config.batch_size: 12 examples"),
])
def test_what_is_missing_or_does_not_fit(make_run, tmp_path, changes, message):
  refused(make_run("align", tmp_path / "run", **changes), message)


def test_stage_2_without_its_tokenizer(make_run, tmp_path):
  config = make_run("instruct", tmp_path / "run", data__llm_tokenizer="nowhere")
  refused(config, "language model tokenizer: no such directory: nowhere")


@pytest.mark.parametrize("field, size", [("stage__model__connector__former__mlp_dim", 64),
                                         ("stage__model__connector__former__layers", 3),
                                         ("stage__model__vision__mlp_dim", 64)])
def test_a_checkpoint_of_another_model(finished, make_run, tmp_path, field, size):
  """Trained or frozen parameters of another shape. The saved configuration, which the message names, is untouched."""
  output = shutil.copytree(finished, tmp_path / "run")
  config = make_run("align", output, steps=40, **{field: size})
  refused(config, r"does not fit this configuration; use the run's own config.json")
  assert (output / "config.json").read_text() == (finished / "config.json").read_text()


def test_init_from_another_model(finished, make_run, tmp_path):
  config = make_run("instruct", tmp_path / "run", init_from=str(finished), stage__model__connector__former__mlp_dim=64)
  refused(config, r": parameter connector/former/stack/.* has shape \(.*\) there, \(.*\) here; make config.stage.model")


def test_a_run_without_checkpoint(make_run, tmp_path):
  (tmp_path / "run").mkdir()
  with pytest.raises(UserError, match="saved configuration not found: .*config.json"):
    open_run(str(tmp_path / "run"))
  (tmp_path / "run" / "config.json").write_text(make_run("align", tmp_path / "run").to_json())
  with pytest.raises(UserError, match="no checkpoint in .*/checkpoints: the run was stopped before its first one"):
    open_run(str(tmp_path / "run"))


def one_line(process):
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 2 and "Traceback" not in output + errors, errors
  said = [line for line in errors.splitlines() if line.startswith("error: ")]
  assert len(said) == 1 and errors.splitlines()[-1] == said[0], errors
  return said[0]


def test_commands_say_it_in_one_line(make_run, start, tmp_path):
  config = make_run("align", tmp_path / "run", data__records="nowhere")
  assert one_line(start(config)).startswith("error: no manifest.json in nowhere")
  assert one_line(start(config, "--config.optimizer.peek_lr=1")) == (
      "error: config.optimizer.peek_lr: unknown field (did you mean peak_lr?)")
  assert one_line(start(config, "--config.stage=pretrain")).startswith(
      "error: config.stage: choose it in the configuration file; the command line sets its fields")
  word = one_line(start(config, "--config.compute.frozen_dtype=int4"))
  assert re.match(r"error: config.compute.frozen_dtype: expected .*'bfloat16'.*'int8'.*, got 'int4'", word), word


def test_a_loss_that_is_not_finite_ends_the_run(make_run, start, tmp_path, records):
  """A learning rate beyond all reason: the first update ruins the model, the second step finds out."""
  config = make_run("align", tmp_path / "run", steps=8, checkpoint_every=1, optimizer__peak_lr=1e30,
                    optimizer__warmup_fraction=0.0)
  line = one_line(start(config))
  assert line.startswith("error: loss or gradient is not finite at step 2 (loss ")
  assert "the update was not applied" in line
  named = line.split("Examples on this host: ")[1].split(". Lower")[0].split(", ")
  assert len(named) == 8 and set(named) <= {record.id for record in records}
  assert steps_of(config.output) == [1] and [entry["step"] for entry in losses(config.output)] == [1]
  assert all(np.isfinite(value).all() for value in saved(config.output)[0].values())


def test_metrics_cut_off_by_a_kill_are_left_out(tmp_path):
  lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines)[:-5])
  assert [entry["step"] for entry in metrics.read(str(tmp_path))] == [1, 2]
  assert metrics.read(str(tmp_path / "nothing")) == []
