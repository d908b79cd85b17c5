"""Records on disk, tiny runs on them, and the gradients that a train step computes on any mesh."""

import dataclasses
import functools
import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lyrics_jax.config import Config
from lyrics_jax.sharding import MeshSettings, global_batch, make_mesh
from lyrics_jax.training.step import initial_state, make_train_step
from refiner_export.records.formats import write_shard
from refiner_export.records.manifest import Manifest, shard_name
from refiner_export.records.schema import SCHEMA_VERSION, Schema

ROOT = pathlib.Path(__file__).parents[3]
FINGERPRINT = "made-up"
VOCABULARY = 1024  # more words than the small tokenizers have
CONFIG_FILE = """import json
import pathlib

from lyrics_jax.config import Config
from refiner_export.common.settings import from_dict


def get_config():
  text = pathlib.Path(__file__).with_suffix(".json").read_text()
  return from_dict(Config, json.loads(text)).unlocked()
"""


@pytest.fixture(scope="session")
def record_directory(records, tmp_path_factory) -> str:
  """The made-up records as an exported directory."""
  directory = tmp_path_factory.mktemp("training") / "records"
  directory.mkdir()
  schema = Schema("bfloat16", FINGERPRINT)
  shard = write_shard(directory / shard_name(0, 1), [schema.item(record) for record in records])
  Manifest(schema_version=SCHEMA_VERSION, fingerprint=FINGERPRINT, feature_dtype="bfloat16", detection_rows=6,
           refiner={"name": "none", "version": 1}, source="made-up", split="train", shards=(shard,),
           records=shard.records, conversations=shard.conversations, pictures=shard.pictures, skipped=0).save(directory)
  return str(directory)


@pytest.fixture(scope="session")
def make_run(record_directory, tokenizer_directory):
  """`make_run(stage, output, **changes)`: a run on those records; stages and changes as in `tiny.make_config`."""

  def make(stage: str, output, **changes) -> Config:
    values = {"output": str(output), "log_every": 1, "data__records": record_directory, "data__buckets": (1.0,),
              "data__spatial_length": 48, "data__caption_length": 16, "data__llm_length": 160}
    if stage != "align":
      values |= {"stage__model__llm__vocab_size": VOCABULARY, "data__llm_tokenizer": f"{tokenizer_directory}/llm"}
    if stage == "llava":
      values |= {"data__mq_former_tokenizer": "", "data__spatial_length": 10}
    else:
      values |= {"stage__model__connector__local__feature_width": 256,
                 "stage__model__connector__former__vocab_size": VOCABULARY,
                 "stage__model__connector__former__max_positions": 64,
                 "data__mq_former_tokenizer": f"{tokenizer_directory}/mq_former"}
    return tiny.make_config(stage, **values | changes)

  return make


@pytest.fixture(scope="session")
def start(tmp_path_factory):
  """`start(config, *arguments, devices=1)`: a process of `python -m lyrics_jax.train` on so many CPU devices.

  Equal programs are compiled once.
  """
  folder = tmp_path_factory.mktemp("commands")
  flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
                              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
  numbers = itertools.count()

  def run(config: Config, *arguments: str, devices: int = 1) -> subprocess.Popen:
    own = folder / str(next(numbers))  # a process may read its configuration when the next one is already starting
    own.mkdir()
    (own / "config.json").write_text(config.to_json())
    (own / "config.py").write_text(CONFIG_FILE)
    on_devices = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
    return subprocess.Popen(
        [sys.executable, "-m", "lyrics_jax.train", "--config", str(own / "config.py"), *arguments], cwd=ROOT,
        env=environment | {"XLA_FLAGS": on_devices}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  return run


@pytest.fixture(scope="session")
def run_to_end(start):
  """`run_to_end(config, *arguments, devices=1)`: trains in a process of its own; returns what it logged."""

  def run(config: Config, *arguments: str, devices: int = 1) -> str:
    process = start(config, *arguments, devices=devices)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors

  return run


@pytest.fixture(scope="session")
def finished(make_run, run_to_end, tmp_path_factory) -> pathlib.Path:
  """The output of a stage-1 run that nothing interrupted. Not to be changed: copy it."""
  output = tmp_path_factory.mktemp("finished") / "align"
  run_to_end(make_run("align", output, steps=40, checkpoint_every=4))
  return output


def gradients_on(config: Config, devices: int, batch, parameters):
  """(gradient, metrics) as the train step of `config` computes them on the mesh `config.mesh` over so many devices.

  The step's own optimizer is replaced by one that only remembers the gradient it was given.
  """
  plan, mesh = tiny.make_plan(config), make_mesh(config.mesh, jax.devices()[:devices])
  remember = optax.trace(decay=0.0)
  laid_out = {}
  for path, sharding in plan.shardings(mesh).items():
    laid_out[path] = jax.device_put(np.asarray(parameters[path]), sharding)
  trained, frozen = plan.split(laid_out)
  step = make_train_step(plan, remember, lambda count: jnp.float32(0), mesh)
  with jax.set_mesh(mesh):
    state = initial_state(plan, remember, mesh, trained)
    state, metrics = step(state, frozen, global_batch(mesh, batch), jax.random.key(7))
  return jax.device_get(state.optimizer.trace), {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="session", name="gradients_on")
def _gradients_on():
  return gradients_on


@dataclasses.dataclass(frozen=True)
class OneDevice:
  """A step on a single device. `parameters` and `gradient` are as they lie in memory."""
  config: Config
  batch: dict[str, np.ndarray]
  parameters: dict[str, jax.Array]
  gradient: dict[str, np.ndarray]
  metrics: dict[str, float]


@pytest.fixture(scope="session")
def one_device() -> Callable[[str], OneDevice]:
  """`one_device(stage)`: the step of a stage, computed once for all tests."""

  @functools.cache
  def compute(stage: str) -> OneDevice:
    config = tiny.make_config(stage, mesh=MeshSettings(1, 1, 1))
    trained, frozen = tiny.make_parameters(tiny.make_plan(config), spread=0.2)
    batch, parameters = tiny.make_batch(config), trained | frozen
    return OneDevice(config, batch, parameters, *gradients_on(config, 1, batch, parameters))

  return compute


def assert_gradients_equal(got: dict[str, Any], expected: dict[str, Any], relative: float = 1e-5):
  """Each within `relative` of the largest element of all gradients: float32 sums in another order."""
  scale = max(np.abs(value).max() for value in expected.values())
  assert got.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(got[path], value, rtol=relative, atol=relative * scale, err_msg=path)


@pytest.fixture(scope="session", name="assert_gradients_equal")
def _assert_gradients_equal():
  return assert_gradients_equal
