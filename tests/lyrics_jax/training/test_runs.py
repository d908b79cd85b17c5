"""Whole runs: stopped and continued, refused, broken off, and one stage begun from the other."""

import json
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from lyrics_jax.sharding import MeshSettings
from lyrics_jax.training.checkpoint import Checkpoints, open_run
from lyrics_jax.training.initialise import initial_parameters
from lyrics_jax.training.loop import train
from lyrics_jax.training.metrics import read
from lyrics_jax.sharding import make_mesh
from refiner_export.common.settings import UserError


def steps_of(output) -> list[int]:
  """Finished checkpoints, ascending; an unfinished one has another name."""
  folder = pathlib.Path(output) / "checkpoints"
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def saved(output):
  """Parameters and optimizer state of the newest checkpoint, as saved."""
  checkpoints = Checkpoints(str(output))
  restored = checkpoints.manager.restore(checkpoints.latest(), args=ocp.args.Composite(
      parameters=ocp.args.StandardRestore(), optimizer=ocp.args.StandardRestore()))
  frozen = checkpoints.restore_frozen()
  checkpoints.close()
  return restored.parameters, restored.optimizer, frozen


def losses(output):
  return [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in read(str(output))]


def stop(process, output, signal_number, after):
  """Sends the signal when a checkpoint beyond step `after` is there; returns the exit code."""
  while not any(step > after for step in steps_of(output)):
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.005)
  process.send_signal(signal_number)
  process.communicate(timeout=120)
  return process.returncode


def test_a_stopped_run_ends_like_one_that_was_not(make_run, start, finished, tmp_path):
  """Killed, preempted, continued: the same bits as a run that nothing interrupted."""
  config = make_run("align", tmp_path / "run", steps=40, checkpoint_every=4)
  assert stop(start(config), config.output, signal.SIGKILL, after=3) == -signal.SIGKILL
  killed = steps_of(config.output)[-1]
  assert 4 <= killed < 40
  assert stop(start(config), config.output, signal.SIGTERM, after=killed) == 0
  preempted = steps_of(config.output)[-1]
  assert killed < preempted < 40 and losses(config.output)[-1]["step"] == preempted  # nothing done was lost
  process = start(config)
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0 and f"continuing from step {preempted} of" in errors
  assert steps_of(config.output)[-1] == 40

  jax.tree.map(np.testing.assert_array_equal, saved(config.output), saved(finished))
  assert losses(config.output) == losses(finished)
  assert [line["step"] for line in losses(finished)] == list(range(1, 41))


def test_training_lowers_the_loss(finished):
  history = losses(finished)
  assert np.mean([line["loss"] for line in history[-5:]]) < np.mean([line["loss"] for line in history[:5]]) - 0.5


def test_every_step_has_its_rates(finished):
  """The last one too, which is written without waiting for another."""
  assert all(line["images_per_second"] > 0 and line["tokens_per_second"] > 0 for line in read(str(finished)))


def test_frozen_parameters_are_saved_once(finished, make_run):
  plan = tiny.make_plan(make_run("align", "unused"))
  parameters, optimizer, frozen = saved(finished)
  assert parameters.keys() == set(plan.paths(True)) and frozen.keys() == set(plan.paths(False))
  assert not {str(key) for path, _ in jax.tree_util.tree_leaves_with_path(optimizer) for key in path} & {
      f"['{path}']" for path in frozen}
  fresh = plan.initialise(tiny.one_device_mesh(plan.config), 0)
  for path, value in frozen.items():  # untouched by forty steps; drawn in another process
    np.testing.assert_allclose(value, fresh[1][path], rtol=1e-6, atol=1e-7, err_msg=path)
  assert any(not np.allclose(parameters[path], fresh[0][path]) for path in parameters)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 1), marks=pytest.mark.slow)])
def test_stage_2_begins_with_the_perception_of_stage_1(finished, make_run, tmp_path, sizes):
  config = make_run("instruct", tmp_path / "run", init_from=str(finished), mesh=MeshSettings(*sizes))
  mesh = make_mesh(config.mesh, jax.devices()[:int(np.prod(sizes))])
  checkpoints = Checkpoints(config.output)
  parts = initial_parameters(tiny.make_plan(config), mesh, checkpoints)
  checkpoints.close()
  earlier, _, earlier_frozen = saved(finished)
  earlier = {path: value for path, value in (earlier | earlier_frozen).items() if path.startswith("perception/")}
  now = {path: value for path, value in (parts[0] | parts[1]).items() if path.startswith("perception/")}
  assert now.keys() == earlier.keys()
  for path, value in now.items():
    np.testing.assert_array_equal(value, earlier[path], err_msg=path)


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
    ({"stage__model__connector__former__vocab_size": 100}, r"config.stage.model.connector.former.vocab_size=100 is too small"),
    ({"init_from": "nowhere"}, r"nowhere"),
    ({"mesh": MeshSettings(3, 1, 1)}, r"config.mesh: .* does not give the 8 devices"),
    ({"batch_size": 12}, r"config.batch_size: 12 examples"),
])
def test_what_is_missing_or_does_not_fit(make_run, tmp_path, changes, message):
  refused(make_run("align", tmp_path / "run", **changes), message)


def test_stage_2_without_its_tokenizer(make_run, tmp_path):
  refused(make_run("instruct", tmp_path / "run", data__llm_tokenizer="nowhere"), "language model tokenizer: no such directory: nowhere")


@pytest.mark.parametrize("changes", [{"stage__model__connector__former__mlp_dim": 64}, {"stage__model__connector__former__layers": 3}, {"stage__model__vision__mlp_dim": 64}],
                         ids=lambda changes: next(iter(changes)))
def test_a_checkpoint_of_another_model(finished, make_run, tmp_path, changes):
  """Trained or frozen parameters of another shape; the saved configuration, which the message points to, is untouched."""
  output = shutil.copytree(finished, tmp_path / "run")
  refused(make_run("align", output, steps=40, **changes), r"does not fit this configuration; use the run's own config.json")
  assert (output / "config.json").read_text() == (finished / "config.json").read_text()


def test_init_from_another_model(finished, make_run, tmp_path):
  refused(make_run("instruct", tmp_path / "run", init_from=str(finished), stage__model__connector__former__mlp_dim=64),
          r"config.init_from=.*: parameter connector/former/stack/.* has shape \(.*\) there, \(.*\) here")


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
  assert one_line(start(config, "--config.optimizer.peek_lr=1")) == "error: config.optimizer.peek_lr: unknown field (did you mean peak_lr?)"
  word = one_line(start(config, "--config.stage=pretrain"))
  assert re.match(r"error: config.stage: expected .*'align', 'instruct'.*, got 'pretrain'", word), word


def test_a_loss_that_is_not_finite_ends_the_run(make_run, start, tmp_path, records):
  """A learning rate beyond all reason: the first update ruins the model, the second step finds out."""
  config = make_run("align", tmp_path / "run", steps=8, checkpoint_every=1, optimizer__peak_lr=1e30, optimizer__warmup_fraction=0.0)
  line = one_line(start(config))
  assert line.startswith("error: loss or gradient is not finite at step 2 (loss ") and "the update was not applied" in line
  named = line.split("Examples on this host: ")[1].split(". Lower")[0].split(", ")
  assert len(named) == 8 and set(named) <= {record.id for record in records}
  assert steps_of(config.output) == [1] and [entry["step"] for entry in losses(config.output)] == [1]
  assert all(np.isfinite(value).all() for value in saved(config.output)[0].values())


def test_metrics_cut_off_by_a_kill_are_left_out(tmp_path):
  lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines)[:-5])
  assert [entry["step"] for entry in read(str(tmp_path))] == [1, 2]
  assert read(str(tmp_path / "nothing")) == []
