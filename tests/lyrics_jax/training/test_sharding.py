"""Meshes: the same parameters, loss and gradients on any of them; parameters that really are split; what does not fit."""

import jax
import numpy as np
import pytest
import tiny

from lyrics_jax.config import MeshConfig
from lyrics_jax.training.sharding import check_batch, make_mesh
from refiner_export.common.settings import UserError

MESHES = [(2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((8, 1, 1), (1, 4, 2)))]


@pytest.mark.parametrize("sizes", MESHES)
def test_loss_and_gradients_are_those_of_one_device(one_device, gradients_on, assert_gradients_equal, sizes):
  config, batch, parameters, gradient, metrics = one_device
  here = tiny.make_config(config.stage, mesh=MeshConfig(*sizes))
  got, got_metrics = gradients_on(here, 8, batch, parameters)
  for name in metrics:
    assert got_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name  # float32 sums in another order
  assert_gradients_equal(got, gradient)


@pytest.mark.parametrize("stage", ["instruct", pytest.param("align", marks=pytest.mark.slow)])
def test_parameters_begin_the_same_on_any_mesh(stage):
  config = tiny.make_config(stage)
  plan = tiny.make_plan(config)
  one, other = (plan.initialise(make_mesh(MeshConfig(*sizes), jax.devices()[:count]), config.seed)
                for sizes, count in (((1, 1, 1), 1), ((2, 2, 2), 8)))
  for here, there in zip(one, other):
    for path in here:
      # Drawn from the same bits; the map from bits to a normal value may round differently.
      np.testing.assert_allclose(there[path], here[path], rtol=1e-6, atol=1e-7, err_msg=path)
  shards = {path: value.addressable_shards[0].data.shape for path, value in (other[0] | other[1]).items()}
  assert shards["perception/mq_former/words/embedding"] == (24, 8)  # vocabulary over tensor, width over fsdp
  assert shards["perception/mq_former/queries"] == (4, 8)
  assert shards["perception/mq_former/stack/blocks/layers/0/self_attention/q/kernel"] == (2, 8, 8)  # layers are not split
  assert shards["perception/mq_former/stack/blocks/layers/0/self_attention/o/kernel"] == (2, 8, 8)
  assert shards["perception/mq_former/stack/blocks/layers/0/query_mlp/up/kernel"] == (2, 8, 16)
  assert shards["perception/mq_former/norm/scale"] == (16,)
  if stage == "instruct":
    assert shards["llm/head/kernel"] == (8, 24)
    assert shards["llm/stack/blocks/q/lora_a"] == (2, 8, 4) and shards["llm/stack/blocks/q/lora_b"] == (2, 4, 8)


def mesh(data, fsdp, tensor, devices=8):
  return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[:devices])


def test_an_open_axis_takes_the_rest():
  assert dict(mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert dict(mesh(2, -1, 1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_multiply(sizes):
  with pytest.raises(UserError, match=r"^config.mesh: data x fsdp x tensor = .* does not give the 8 devices here$"):
    mesh(*sizes)


def test_a_batch_that_does_not_divide():
  check_batch(12, mesh(2, 2, 2))
  with pytest.raises(UserError, match="config.batch_size: 6 examples per microbatch are not a multiple of the 4 devices that "
                                      "config.mesh.data x config.mesh.fsdp"):
    check_batch(6, mesh(2, 2, 2))


@pytest.mark.parametrize("changes, sizes, message", [
    ({"model__mq_former__vocab_size": 47}, (1, 4, 2),
     r"config.mesh.tensor=2 does not divide dimension 'vocab' \(47\) of parameter lm_head/bias"),
    ({"model__mq_former__mlp_dim": 33}, (1, 1, 8),
     r"config.mesh.tensor=8 does not divide dimension 'mlp' \(33\) of parameter perception/mq_former/stack/.*/down/kernel"),
    ({"model__mq_former__width": 18}, (1, 4, 2), r"config.mesh.fsdp=4 does not divide dimension 'embed' \(18\) of parameter itm/kernel"),
])
def test_a_dimension_that_does_not_divide(changes, sizes, message):
  plan = tiny.make_plan(tiny.make_config(**changes))
  with pytest.raises(UserError, match=message):
    plan.shardings(mesh(*sizes))
