"""A run from before parameters were named after the parts of the model is read: every value has today's name."""

import pathlib
import tarfile

import jax
import numpy as np
import pytest
import small
import tiny

from lyrics_jax.sharding import MeshSettings, make_mesh
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.initialise import initial_parameters
from lyrics_jax.training.old_names import renamed
from lyrics_jax.weights.sources import find
from refiner_export.common.settings import UserError

ARCHIVE = pathlib.Path(__file__).parents[1] / "golden" / "run_of_revision_1.tar.gz"


@pytest.fixture(scope="module")
def old_run(tmp_path_factory) -> pathlib.Path:
  """The output directory: config.json, a checkpoint, frozen parameters; and values.npz, what they hold."""
  directory = tmp_path_factory.mktemp("old")
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(directory, filter="data")
  return directory


@pytest.fixture(scope="module")
def expected(old_run) -> dict[str, np.ndarray]:
  """The values by today's names, every kernel [..., n, m]."""
  values = {}
  for name, value in np.load(old_run / "values.npz").items():
    name = name.replace("|", "/")
    if name.endswith("/weight"):
      name, value = name.replace("/weight", "/kernel"), value.swapaxes(-1, -2)
    for old, new in (("perception/vision/", "vision/"), ("perception/mq_former/", "connector/former/"),
                     ("perception/", "connector/"), ("projection/", "connector/projection/")):
      if name.startswith(old):
        name = name.replace(old, new, 1)
        break
    values[name] = value
  return values


def test_every_value_is_found(old_run, expected):
  config = small.make_config("instruct", init_from=str(old_run))
  plan = tiny.make_plan(config)
  origin = find(config.init_from, plan)
  assert set(origin.paths()) == set(expected) == set(plan.shapes) and not origin.left_over
  for path, value in expected.items():
    np.testing.assert_array_equal(origin.read(path), value, err_msg=path)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_starts_from_it(devices, old_run, expected, tmp_path):
  mesh = MeshSettings(1, 1, 1) if devices == 1 else MeshSettings(2, 2, 2)
  config = small.make_config("instruct", init_from=str(old_run), mesh=mesh)
  plan, checkpoints = tiny.make_plan(config), Checkpoints(str(tmp_path / "run"))
  trained, frozen = initial_parameters(plan, make_mesh(mesh, jax.devices()[:devices]), checkpoints,
                                       find(config.init_from, plan))
  checkpoints.close()
  parameters = plan.turned(trained | frozen)
  assert parameters.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(np.asarray(parameters[path]), value, err_msg=path)


def test_stage_1_of_it_finds_what_it_has(old_run, expected):
  """Heads and the projection have no place in the other model."""
  origin = find(str(old_run), tiny.make_plan(small.make_config("align")))
  assert {path.split("/")[0] for path in origin.paths()} == {"vision", "connector"}
  left_over = origin.left_over["without a place in this model"]
  assert {path.split("/")[0] for path in left_over} == {"connector", "llm"}
  assert len(origin.paths()) + len(left_over) == len(expected)


def test_scales_of_int8_and_todays_names():
  assert renamed("llm/stack/blocks/q/weight_scale") == ("llm/stack/blocks/q/kernel_scale", False)
  assert renamed("llm/stack/blocks/q/weight") == ("llm/stack/blocks/q/kernel", True)
  for path in ("llm/stack/blocks/q/kernel", "connector/former/queries", "vision/class_token", "temperature"):
    assert renamed(path) == (path, False)


def test_another_size_is_one_line(old_run):
  plan = tiny.make_plan(small.make_config("instruct", vision__mlp_dim=64))
  with pytest.raises(UserError, match=r"has shape \(2, 32, 16\) there, \(2, 64, 16\) here; make config.stage.model a"):
    find(str(old_run), plan)
