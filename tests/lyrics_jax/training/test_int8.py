"""Runs whose frozen kernels are in int8: bytes, adapters that learn nearly the same, checkpoints, other starts."""

import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.int8 import SCALE, quantise
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.sharding import MeshSettings, make_mesh
from lyrics_jax.stage import Stage
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.initialise import initial_parameters
from lyrics_jax.training.parameters import ModelParameters
from lyrics_jax.weights.sources import find

BLOCKS = ("llm/stack/", "vision/stack/")


def published(frozen_dtype: str) -> ModelParameters:
  """Stage 2 with adapters, at the paper's sizes."""
  config = Config(
      stage=Stage(VLMSettings(), (NextToken(),), tiny.LORA), output="unused",
      compute=Compute(frozen_dtype=frozen_dtype),
      data=DataSettings(records="unused", rows=Conversations(), mq_former_tokenizer="unused", llm_tokenizer="unused"))
  config.finalize()
  return tiny.make_plan(config)


def test_vicuna_13b_in_int8_takes_about_half():
  """Nothing is allocated."""
  size = {}
  for dtype in ("bfloat16", "int8"):
    plan = published(dtype)
    frozen = [plan.shapes[path] for path in plan.paths(False) if path.startswith("llm/")]
    size[dtype] = sum(array.size * array.dtype.itemsize for array in frozen)
  assert size["bfloat16"] == 2 * 13_015_864_320
  # Words, head and norms stay in bfloat16; a scale is float32.
  head, norms, scales = 2 * 32_000 * 5_120, 81 * 5_120, 40 * (5 * 5_120 + 2 * 13_824)
  assert size["int8"] == 13_015_864_320 + head + norms + 4 * scales
  assert 0.51 < size["int8"] / size["bfloat16"] < 0.52


@pytest.mark.parametrize("train, blocks", [("lora", BLOCKS), ("frozen", BLOCKS), ("full", BLOCKS[1:])])
def test_only_frozen_kernels_of_blocks_are_quantised(train, blocks):
  plan = tiny.make_plan(tiny.make_config("instruct", **tiny.TRAIN[train], compute__frozen_dtype="int8"))
  dtypes = {path: shape.dtype.name for path, shape in plan.shapes.items()}
  quantised = {path for path in dtypes if path.startswith(blocks) and path.endswith("/kernel")}
  assert quantised and {path for path in dtypes if dtypes[path] == "int8"} == quantised
  assert {path for path in dtypes if path.endswith(SCALE)} == {path + SCALE for path in quantised}
  assert all(dtypes[path] == ("float32" if path.endswith(SCALE) else "bfloat16")
             for path in plan.paths(False) if path not in quantised)
  assert all(dtypes[path] == "float32" for path in plan.paths(True))


def in_int8(frozen):
  """The parameters of a float32 run in the form of an int8 run; both as they lie in memory."""
  plan, stored = tiny.make_plan(tiny.make_config("instruct", compute__frozen_dtype="int8")), {}
  for path, value in frozen.items():
    if path + SCALE in plan.shapes:
      stored[path], stored[path + SCALE] = quantise(value, -1 if path in plan.transposed else -2)
    else:
      stored[path] = value.astype(plan.shapes[path].dtype)
  return stored


@pytest.fixture(scope="module")
def both():
  """Trained parameters, and the same frozen ones in either form."""
  trained, frozen = tiny.make_parameters(tiny.make_plan(tiny.make_config("instruct")), spread=0.2)
  return trained, {"float32": frozen, "int8": in_int8(frozen)}


def test_adapters_learn_nearly_the_same(one_device, gradients_on):
  """A train step on four devices with the kernels in int8, against one with the same kernels in float32."""
  one = one_device("instruct")
  here = tiny.make_config("instruct", compute__frozen_dtype="int8", mesh=MeshSettings(1, 2, 2))
  trained, frozen = tiny.make_plan(one.config).split(one.parameters)
  rounded, metrics = gradients_on(here, 4, one.batch, trained | in_int8(frozen))
  assert metrics["loss"] == pytest.approx(one.metrics["loss"], rel=0.01)
  assert rounded.keys() == one.gradient.keys()
  adapters = [path for path in rounded if "/lora_" in path]
  assert len(adapters) == 4
  for path in adapters:
    error = np.linalg.norm(rounded[path] - one.gradient[path])
    assert error < 0.15 * np.linalg.norm(one.gradient[path]), path


def write_run(config: Config, trained, frozen):
  """What a run of this configuration leaves, with these parameters."""
  plan, checkpoints = tiny.make_plan(config), Checkpoints(config.output)
  checkpoints.manager.save(1, args=ocp.args.Composite(parameters=ocp.args.StandardSave(plan.turned(trained))))
  checkpoints.save_frozen(frozen, plan)
  checkpoints.close()
  (checkpoints.output / "config.json").write_text(config.to_json())


@pytest.mark.parametrize("source, here, sizes", [
    ("float32", "int8", (2, 2, 2)), ("int8", "int8", (1, 1, 1)), ("int8", "float32", (1, 1, 1))])
def test_a_run_starts_from_one_in_another_form(both, tmp_path, source, here, sizes):
  trained, frozen = both
  config = tiny.make_config("instruct", compute__frozen_dtype=source, output=str(tmp_path / "earlier"))
  write_run(config, trained, frozen[source])

  plan = tiny.make_plan(tiny.make_config("instruct", compute__frozen_dtype=here, init_from=config.output))
  mesh = make_mesh(MeshSettings(*sizes), jax.devices()[:math.prod(sizes)])
  checkpoints = Checkpoints(str(tmp_path / "run"))
  _, got = initial_parameters(plan, mesh, checkpoints, find(config.output, plan))
  assert list(got) == plan.paths(False)
  for path, value in got.items():
    assert (value.shape, value.dtype) == (plan.memory[path].shape, plan.memory[path].dtype)
    if here == "int8":  # exactly, but for the last bit of a scale that another program computed
      tolerance = 1e-6 if source == "float32" else 0
      np.testing.assert_allclose(value, frozen["int8"][path], rtol=tolerance, err_msg=path)
    elif path + SCALE in frozen["int8"]:
      rounding = float(frozen["int8"][path + SCALE].max()) * 0.501
      np.testing.assert_allclose(value, frozen["float32"][path], atol=rounding, err_msg=path)

  checkpoints.save_frozen(got, plan)  # they are the run's own from then on
  again = checkpoints.restore_frozen(plan, plan.shardings(mesh, stored=True))
  checkpoints.close()
  for path in got:
    assert again[path].dtype == got[path].dtype and again[path].sharding == got[path].sharding
    np.testing.assert_array_equal(again[path], got[path], err_msg=path)
