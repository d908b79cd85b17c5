"""Records on disk, tiny runs on them, and the gradients that a train step computes on any mesh."""

import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lyrics_jax.config import Config, MeshConfig
from lyrics_jax.training.sharding import global_batch, make_mesh
from lyrics_jax.training.step import initial_state, make_train_step
from refiner_export.records.manifest import Manifest, shard_name
from refiner_export.records.record import SCHEMA_VERSION, Schema
from refiner_export.records.tfrecord import write_shard

ROOT = pathlib.Path(__file__).parents[3]
FINGERPRINT = "made-up"


@pytest.fixture(scope="session")
def record_directory(records, tmp_path_factory) -> str:
  """The made-up records as an exported directory."""
  directory = tmp_path_factory.mktemp("training") / "records"
  directory.mkdir()
  schema = Schema("bfloat16", FINGERPRINT)
  shard = write_shard(directory / shard_name(0, 1), [(schema.encode(record), len(record.conversations)) for record in records])
  Manifest(schema_version=SCHEMA_VERSION, fingerprint=FINGERPRINT, feature_dtype="bfloat16", detection_rows=6,
           refiner={"name": "none", "version": 1}, source="made-up", split="train", shards=(shard,), records=len(records),
           conversations=shard.conversations, skipped=0).save(directory)
  return str(directory)


@pytest.fixture(scope="session")
def make_run(record_directory, tokenizer_directory):
  """`make_run(stage, output, **changes)`: the configuration of a run on those records; changes as in `tiny.make_config`."""

  def make(stage: str, output, **changes) -> Config:
    return tiny.make_config(stage, **{
        "output": str(output), "log_every": 1, "model__refiner__feature_width": 256, "model__mq_former__vocab_size": 1024,
        "model__mq_former__max_positions": 64, "model__llm__vocab_size": 1024, "data__records": record_directory,
        "data__mq_former_tokenizer": f"{tokenizer_directory}/mq_former", "data__llm_tokenizer": f"{tokenizer_directory}/llm",
        "data__spatial_length": 48, "data__caption_length": 16, "data__llm_length": 160, "data__buckets": (1.0,), **changes})

  return make


@pytest.fixture(scope="session")
def start(tmp_path_factory):
  """`start(config)`: a process of `python -m lyrics_jax.train` on one CPU device, or more. Equal programs are compiled once."""
  folder = tmp_path_factory.mktemp("commands")
  flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
                              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
  numbers = itertools.count()

  def run(config: Config, *arguments: str, devices: int = 1) -> subprocess.Popen:
    own = folder / str(next(numbers))  # a process may read its configuration when the next one is already starting
    own.mkdir()
    (own / "config.json").write_text(config.to_json())
    path = own / "config.py"
    path.write_text("import json\nfrom lyrics_jax.config import Config\nfrom refiner_export.common.settings import from_dict\n\n\n"
                    f"def get_config():\n  config = from_dict(Config, json.load(open({str(own / 'config.json')!r})))\n"
                    "  config.__dict__.pop('_final')\n  return config\n")
    return subprocess.Popen([sys.executable, "-m", "lyrics_jax.train", "--config", str(path), *arguments], cwd=ROOT,
                            env=environment | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  return run


@pytest.fixture(scope="session")
def finished(make_run, start, tmp_path_factory) -> pathlib.Path:
  """The output of a stage-1 run that nothing interrupted. Not to be changed: copy it."""
  output = tmp_path_factory.mktemp("finished") / "align"
  process = start(make_run("align", output, steps=40, checkpoint_every=4))
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  return output


def gradients_on(config: Config, devices: int, batch, parameters):
  """(gradient, metrics) as the train step of `config` computes them on the mesh `config.mesh` over so many devices.

  The step's own optimizer is replaced by one that only remembers the gradient it was given.
  """
  plan, mesh = tiny.make_plan(config), make_mesh(config.mesh, jax.devices()[:devices])
  remember = optax.trace(decay=0.0)
  trained, frozen = plan.split({path: jax.device_put(np.asarray(parameters[path]), sharding)
                                for path, sharding in plan.shardings(mesh).items()})
  step = make_train_step(plan, remember, lambda count: jnp.float32(0), mesh)
  with jax.set_mesh(mesh):
    state, metrics = step(initial_state(plan, remember, mesh, trained), frozen, global_batch(mesh, batch), jax.random.key(7))
  return jax.device_get(state.optimizer.trace), {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="session", params=["align", "instruct"])
def one_device(request):
  """(config, batch, parameters, gradient, metrics) of each stage on a single device."""
  config = tiny.make_config(request.param, mesh=MeshConfig(1, 1, 1))
  trained, frozen = tiny.make_parameters(tiny.make_plan(config), spread=0.2)
  batch, parameters = tiny.make_batch(config), trained | frozen
  return config, batch, parameters, *gradients_on(config, 1, batch, parameters)


@pytest.fixture(scope="session", name="gradients_on")
def _gradients_on():
  return gradients_on


def assert_gradients_equal(got, expected, relative=1e-5):
  """Each within `relative` of the largest element of all gradients: float32 sums in another order."""
  scale = max(np.abs(value).max() for value in expected.values())
  assert got.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(got[path], value, rtol=relative, atol=relative * scale, err_msg=path)


@pytest.fixture(scope="session", name="assert_gradients_equal")
def _assert_gradients_equal():
  return assert_gradients_equal
