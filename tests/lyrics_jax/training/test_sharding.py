"""Meshes: the same parameters, loss and gradients on any mesh, parameters that are really split, what does not fit."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from lyrics_jax.sharding import MeshSettings, check_batch, make_mesh
from refiner_export.common.settings import UserError

MESHES = [(2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((8, 1, 1), (1, 4, 2)))]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("stage", ["align", "instruct", "llava"])
def test_loss_and_gradients_are_those_of_one_device(one_device, gradients_on, assert_gradients_equal, stage, sizes):
  one = one_device(stage)
  here = tiny.make_config(stage, mesh=MeshSettings(*sizes))
  got, got_metrics = gradients_on(here, 8, one.batch, one.parameters)
  for name in one.metrics:
    assert got_metrics[name] == pytest.approx(one.metrics[name], rel=1e-5), name  # float32 sums in another order
  assert_gradients_equal(got, one.gradient)


@pytest.mark.parametrize("stage", ["instruct", pytest.param("align", marks=pytest.mark.slow)])
def test_parameters_begin_the_same_on_any_mesh(stage):
  config = tiny.make_config(stage)
  plan = tiny.make_plan(config)
  one = plan.initialise(mesh(1, 1, 1, devices=1), config.seed)
  other = plan.initialise(mesh(2, 2, 2), config.seed)
  for here, there in zip(one, other):
    for path in here:
      # Drawn from the same bits; the map from bits to a normal value may round differently.
      np.testing.assert_allclose(there[path], here[path], rtol=1e-6, atol=1e-7, err_msg=path)
  shards = {path: value.addressable_shards[0].data.shape for path, value in (other[0] | other[1]).items()}
  assert shards["connector/former/words/embedding"] == (24, 8)  # vocabulary over tensor, width over fsdp
  assert shards["connector/former/queries"] == (4, 8)
  assert shards["connector/former/stack/blocks/layers/0/self_attention/q/kernel"] == (2, 8, 8)  # layers are not split
  assert shards["connector/former/stack/blocks/layers/0/self_attention/o/kernel"] == (2, 8, 8)
  assert shards["connector/former/stack/blocks/layers/0/query_mlp/up/kernel"] == (2, 8, 16)
  assert shards["connector/former/norm/scale"] == (16,)
  if stage == "instruct":
    assert shards["llm/head/kernel"] == (8, 24)
    assert shards["llm/stack/blocks/q/kernel"] == (2, 8, 8) and shards["llm/stack/blocks/gate/kernel"] == (2, 8, 16)
    assert shards["llm/stack/blocks/q/lora_a"] == (2, 8, 4) and shards["llm/stack/blocks/q/lora_b"] == (2, 4, 8)


def test_a_kernel_that_lies_turned_around_is_split_along_the_same_axes():
  """Inputs over fsdp and heads over tensor, in memory and in checkpoints; one head of keys makes the matrix oblong."""
  plan = tiny.make_plan(tiny.make_config("instruct", stage__model__llm__kv_heads=1))
  path = "llm/stack/blocks/k/kernel"
  assert path in plan.transposed and plan.shapes[path].shape == (2, 16, 8) and plan.memory[path].shape == (2, 8, 16)
  assert plan.shardings(mesh(1, 4, 2), stored=True)[path].spec == PartitionSpec(None, "fsdp", "tensor")
  assert plan.shardings(mesh(1, 4, 2))[path].spec == PartitionSpec(None, "tensor", "fsdp")


def mesh(data, fsdp, tensor, devices=8):
  return make_mesh(MeshSettings(data, fsdp, tensor), jax.devices()[:devices])


def test_an_open_axis_takes_the_rest():
  assert dict(mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert dict(mesh(2, -1, 1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_multiply(sizes):
  with pytest.raises(UserError, match=r"^config.mesh: data x fsdp x tensor = .* does not give the 8 devices here$"):
    mesh(*sizes)


def test_a_batch_that_does_not_divide():
  check_batch(12, mesh(2, 2, 2))
  message = ("config.batch_size: 6 examples per microbatch are not a multiple of the 4 devices that "
             "config.mesh.data x config.mesh.fsdp")
  with pytest.raises(UserError, match=message):
    check_batch(6, mesh(2, 2, 2))


@pytest.mark.parametrize("changes, sizes, message", [
    ({"stage__model__connector__former__vocab_size": 47}, (1, 4, 2),
     r"config.mesh.tensor=2 does not divide dimension 'vocab' \(47\) of parameter connector/former/words/embedding"),
    ({"stage__model__connector__former__mlp_dim": 33}, (1, 1, 8),
     r"config.mesh.tensor=8 does not divide dimension 'mlp' \(33\) of parameter connector/former/stack/.*/down/kernel"),
    ({"stage__model__connector__former__width": 18}, (1, 4, 2),
     r"config.mesh.fsdp=4 does not divide dimension 'embed' \(18\) of parameter "),
])
def test_a_dimension_that_does_not_divide(changes, sizes, message):
  plan = tiny.make_plan(tiny.make_config(**changes))
  with pytest.raises(UserError, match=message):
    plan.shardings(mesh(*sizes))
