"""Runs whose frozen kernels are in int8: bytes, adapters that learn nearly the same, checkpoints, starts from other forms."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from lyrics_jax.config import Config, DataConfig, MeshSettings, ModelConfig
from lyrics_jax.models.layers.int8 import SCALE, inputs_axis, quantise
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.initialise import initial_parameters
from lyrics_jax.sharding import make_mesh

BLOCKS = ("llm/stack/", "vision/stack/")


def published(**model):
  config = Config(stage="instruct", output="unused", model=ModelConfig(**model),
                  data=DataConfig(records="unused", mq_former_tokenizer="unused", llm_tokenizer="unused"))
  config.finalize()
  return tiny.make_plan(config)


def test_vicuna_13b_in_int8_takes_about_half():
  """Nothing is allocated."""
  size = {}
  for dtype in ("bfloat16", "int8"):
    plan = published(frozen_dtype=dtype)
    size[dtype] = sum(plan.shapes[path].size * plan.shapes[path].dtype.itemsize for path in plan.paths(False)
                      if path.startswith("llm/"))
  assert size["bfloat16"] == 2 * 13_015_864_320
  # Words, head and norms stay in bfloat16; a scale is float32.
  head, norms, scales = 2 * 32_000 * 5_120, 81 * 5_120, 40 * (5 * 5_120 + 2 * 13_824)
  assert size["int8"] == 13_015_864_320 + head + norms + 4 * scales
  assert 0.51 < size["int8"] / size["bfloat16"] < 0.52


@pytest.mark.parametrize("train", ["lora", "full"])
def test_only_frozen_kernels_of_blocks_are_quantised(train):
  plan = tiny.make_plan(tiny.make_config("instruct", stage__model__llm__train=train, compute__frozen_dtype="int8"))
  dtypes = {path: shape.dtype.name for path, shape in plan.shapes.items()}
  blocks = BLOCKS if train == "lora" else BLOCKS[1:]
  quantised = {path for path in dtypes if path.startswith(blocks) and path.endswith(("/kernel", "/weight"))}
  assert quantised and {path for path in dtypes if dtypes[path] == "int8"} == quantised
  assert {path for path in dtypes if path.endswith(SCALE)} == {path + SCALE for path in quantised}
  assert all(dtypes[path] == ("float32" if path.endswith(SCALE) else "bfloat16")
             for path in plan.paths(False) if path not in quantised)
  assert all(dtypes[path] == "float32" for path in plan.paths(True))


def in_int8(frozen):
  """The parameters of a float32 run in the form of an int8 run."""
  plan, stored = tiny.make_plan(tiny.make_config("instruct", compute__frozen_dtype="int8")), {}
  for path, value in frozen.items():
    if path + SCALE in plan.shapes:
      stored[path], stored[path + SCALE] = quantise(value, inputs_axis(path))
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
  config, batch, parameters, gradient, metrics = one_device
  if config.stage != "instruct":
    pytest.skip("stage 1 has no adapters")
  here = tiny.make_config("instruct", compute__frozen_dtype="int8", mesh=MeshSettings(1, 2, 2))
  trained, frozen = tiny.make_plan(config).split(parameters)
  rounded, rounded_metrics = gradients_on(here, 4, batch, trained | in_int8(frozen))
  assert rounded_metrics["loss"] == pytest.approx(metrics["loss"], rel=0.01)
  assert rounded.keys() == gradient.keys()
  for path in (path for path in gradient if "/lora_" in path):
    assert np.linalg.norm(rounded[path] - gradient[path]) < 0.15 * np.linalg.norm(gradient[path]), path


@pytest.mark.parametrize("source, here, mesh", [
    ("float32", "int8", (2, 2, 2)), ("int8", "int8", (1, 1, 1)), ("int8", "float32", (1, 1, 1))])
def test_a_run_starts_from_one_in_another_form(both, tmp_path, source, here, mesh):
  trained, frozen = both
  config = tiny.make_config("instruct", compute__frozen_dtype=source, output=str(tmp_path / "earlier"))
  earlier = Checkpoints(config.output)
  earlier.manager.save(1, args=ocp.args.Composite(parameters=ocp.args.StandardSave(trained)))
  earlier.save_frozen(frozen[source])
  earlier.close()
  (tmp_path / "earlier" / "config.json").write_text(config.to_json())

  plan = tiny.make_plan(tiny.make_config("instruct", compute__frozen_dtype=here, init_from=config.output))
  own = Checkpoints(str(tmp_path / "run"))
  _, got = initial_parameters(plan, make_mesh(MeshSettings(*mesh), jax.devices()[:int(np.prod(mesh))]), own)
  assert list(got) == plan.paths(False) and all(got[path].dtype == plan.shapes[path].dtype for path in got)
  for path in got:
    if here == "int8":  # exactly, but for the last bit of a scale that another program computed
      np.testing.assert_allclose(got[path], frozen["int8"][path], rtol=1e-6 if source == "float32" else 0, err_msg=path)
    elif path + SCALE in frozen["int8"]:
      rounding = float(frozen["int8"][path + SCALE].max()) * 0.501
      np.testing.assert_allclose(got[path], frozen["float32"][path], atol=rounding)

  own.save_frozen(got)  # and is its own from then on
  again = own.restore_frozen({path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
                              for path, value in got.items()})
  own.close()
  for path in got:
    assert again[path].dtype == got[path].dtype
    np.testing.assert_array_equal(again[path], got[path], err_msg=path)
