"""Several processes that train one model: like one process, preempted together, continued by fewer."""

import dataclasses
import signal
import socket
import time

import jax
import numpy as np
import pytest
from run_output import steps_of

from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.sharding import MeshSettings, make_mesh
from lyrics_jax.training import hosts
from lyrics_jax.training.metrics import read
from refiner_export.common.settings import UserError

STEPS = 6


def on_hosts(start, config, count):
  """Processes of `python -m lyrics_jax.train` on this machine, with 8 devices together."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = []
  for index in range(count):
    processes.append(start(config, f"--hosts={address},{count},{index}", devices=8 // count))
  return processes


def finish(processes):
  errors = [process.communicate(timeout=300)[1] for process in processes]
  assert [process.returncode for process in processes] == [0] * len(processes), errors
  return errors


def assert_same_run(output, other):
  assert steps_of(output) == steps_of(other)
  trained, _ = LoadedModel.open(output).parameters
  expected, _ = LoadedModel.open(other).parameters
  assert trained.keys() == expected.keys()
  for path, value in expected.items():
    # A key's bias shifts all scores of a query alike. Its gradient is rounding alone, of which Adam makes whole steps.
    if not path.endswith("/k/bias"):
      np.testing.assert_allclose(trained[path], value, atol=1e-4, err_msg=path)  # after steps of 1e-2
  for here, there in zip(read(str(output)), read(str(other)), strict=True):
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)


@pytest.fixture(scope="module", params=["instruct", pytest.param("align", marks=pytest.mark.slow)])
def one_process(request, make_run, run_to_end, tmp_path_factory):
  """The configuration of a finished run of one process with eight devices."""
  config = make_run(request.param, tmp_path_factory.mktemp("alone") / "run", steps=STEPS, checkpoint_every=3,
                    mesh=MeshSettings(2, 2, 2), stage__model__connector__former__dropout=0.1)
  run_to_end(config, devices=8)
  return config


def elsewhere(config, output, **changes):
  return dataclasses.replace(config, output=str(output), **changes)


def test_two_processes_train_like_one(one_process, start, tmp_path):
  """Two hosts of four devices, each host a slice of its own: gradients cross between them."""
  config = elsewhere(one_process, tmp_path / "run", mesh=MeshSettings(2, 2, 2, slices=2))
  finish(on_hosts(start, config, 2))
  assert_same_run(config.output, one_process.output)


def test_preempted_together_and_continued_by_one(one_process, start, run_to_end, tmp_path):
  """One of two hosts is told to stop: both save the same step, and a single process goes on from there."""
  config = elsewhere(one_process, tmp_path / "run", steps=10_000, checkpoint_every=3)
  processes = on_hosts(start, config, 2)
  while not (tmp_path / "run/checkpoints/3").exists():
    assert all(process.poll() is None for process in processes), [process.communicate()[1] for process in processes]
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  errors = finish(processes)
  assert all("preempted: saved step" in lines for lines in errors)
  step = steps_of(config.output)[-1]
  longer = run_to_end(elsewhere(config, config.output, steps=step + 1), devices=8)
  assert f"continuing from step {step} of" in longer
  assert [line["step"] for line in read(config.output)] == list(range(1, step + 2))


@pytest.mark.parametrize("flag, message", [
    ("10.0.0.1,2,0", "--hosts=10.0.0.1,2,0: expected ADDRESS:PORT,COUNT,INDEX"),
    ("10.0.0.1:80,two,0", "--hosts=10.0.0.1:80,two,0: expected ADDRESS:PORT,COUNT,INDEX"),
    ("10.0.0.1:80,2,2", "--hosts=10.0.0.1:80,2,2: the processes are numbered 0 to 1"),
])
def test_a_mistaken_flag(flag, message):
  with pytest.raises(UserError, match=message):
    hosts.join(flag)


def test_slices_that_are_not_there():
  with pytest.raises(UserError, match="config.mesh.slices=2, but the devices here are of 1"):
    make_mesh(MeshSettings(4, 2, 1, slices=2), jax.devices()[:8])
