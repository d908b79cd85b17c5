"""Accumulated gradients, updates that are refused, and what frozen parameters cost."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lyrics_jax.sharding import MeshSettings, global_batch
from lyrics_jax.training.compiler import compiler_options
from lyrics_jax.training.optimizer import learning_rate, make_optimizer
from lyrics_jax.training.step import initial_state, make_train_step


def halves(batch):
  parts = []
  for rows in (slice(0, 4), slice(4, 8)):
    parts.append({name: value[rows] for name, value in batch.items()})
  return parts


@pytest.mark.parametrize("devices", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_microbatches_add_up_to_the_large_batch(one_device, gradients_on, assert_gradients_equal, devices):
  """Instruct: rows with different numbers of targets weigh by them, whichever microbatch they are in."""
  one = one_device("instruct")
  first, second = halves(one.batch)
  assert first["targets"][:, 1:].sum() != second["targets"][:, 1:].sum()
  here = tiny.make_config("instruct", optimizer__accumulate_steps=2, mesh=MeshSettings(devices, 1, 1))
  got, got_metrics = gradients_on(here, devices, one.batch, one.parameters)
  for name in ("loss", "lm", "token_accuracy", "gradient_norm"):
    assert got_metrics[name] == pytest.approx(one.metrics[name], rel=1e-5), name  # float32 sums in another order
  assert_gradients_equal(got, one.gradient)


@pytest.mark.slow
def test_align_contrasts_within_a_microbatch(one_device, gradients_on, assert_gradients_equal):
  one = one_device("align")
  here = tiny.make_config("align", optimizer__accumulate_steps=2, mesh=MeshSettings(1, 1, 1))
  got, got_metrics = gradients_on(here, 1, one.batch, one.parameters)
  plan = tiny.make_plan(one.config)
  trained, frozen = plan.split(one.parameters)

  def loss(trained, part, key):
    return plan.config.stage.loss(plan.model(trained, frozen), part, key).value

  single = jax.jit(jax.value_and_grad(loss))
  keys = jax.random.split(jax.random.fold_in(jax.random.key(7), 0), 2)
  values, gradients = zip(*(single(trained, part, key) for part, key in zip(halves(one.batch), keys)))
  assert got_metrics["loss"] == pytest.approx(float(sum(values)) / 2, rel=1e-5)
  assert_gradients_equal(got, jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *gradients))
  assert got_metrics["itc"] < one.metrics["itc"]  # fewer candidates to tell apart: ln 4, not ln 8


def test_an_update_that_is_not_finite_is_refused():
  config = tiny.make_config("instruct")
  plan, mesh = tiny.make_plan(config), tiny.one_device_mesh(config)
  optimizer = make_optimizer(config.optimizer, config.steps, plan.axes)
  step = make_train_step(plan, optimizer, learning_rate(config.optimizer, config.steps), mesh)
  trained, frozen = plan.initialise(mesh, 0)
  batch = tiny.make_batch(config)
  with jax.set_mesh(mesh):
    state = initial_state(plan, optimizer, mesh, trained)
    state, metrics = step(state, frozen, global_batch(mesh, batch), jax.random.key(0))
    assert metrics["finite"] and metrics["learning_rate"] > 0  # the first update moves
    before = jax.device_get(state)
    assert int(before.step) == 1
    batch["detection"][0, 0, 0], batch["detection_mask"][0, 0, 0] = np.nan, True
    state, metrics = step(state, frozen, global_batch(mesh, batch), jax.random.key(0))
  assert not metrics["finite"]
  after = jax.device_get(state)
  jax.tree.map(np.testing.assert_array_equal, after.parameters, before.parameters)
  jax.tree.map(np.testing.assert_array_equal, after.optimizer, before.optimizer)


@pytest.mark.parametrize("train, share", [("lora", 0), ("frozen", 0), ("full", 1)])
def test_frozen_kernels_have_no_gradient(train, share):
  """Counts the bytes that the gradient computes in the shapes of the language model's MLP, which are only there."""
  plan = tiny.make_plan(tiny.make_config("instruct", **tiny.TRAIN[train], stage__model__llm__mlp_dim=44))
  trained, frozen = plan.split(plan.memory)

  def loss(trained, frozen, batch):
    return plan.config.stage.loss(plan.model(trained, frozen), batch, None).value

  program = jax.make_jaxpr(jax.grad(loss))(trained, frozen, plan.config.batch_spec())
  kernels = [plan.memory[f"llm/stack/blocks/{name}/kernel"] for name in ("gate", "up", "down")]
  shapes = {kernel.shape for kernel in kernels}
  size = 0
  for equation in program.jaxpr.eqns:
    for variable in equation.outvars:
      array = variable.aval
      size += array.size * array.dtype.itemsize if array.shape in shapes else 0
  assert size == share * sum(4 * kernel.size for kernel in kernels)


@pytest.mark.parametrize("train", ["full", "lora", "frozen"])
def test_frozen_parameters_have_no_optimizer_state(train):
  plan = tiny.make_plan(tiny.make_config("instruct", **tiny.TRAIN[train], compute__frozen_dtype="bfloat16"))
  optimizer = make_optimizer(plan.config.optimizer, 10, plan.axes)
  trained, _ = plan.split(plan.memory)
  state = jax.eval_shape(optimizer.init, trained)
  counters = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == () and leaf.dtype == jnp.int32]
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) - 4 * len(counters)
  assert size == 2 * 4 * plan.count(trained=True)  # two float32 moments each
  assert {plan.shapes[path].dtype for path in plan.paths(False)} == {jnp.dtype("bfloat16")}
  assert {plan.shapes[path].dtype for path in plan.paths(True)} == {jnp.dtype("float32")}
  adam = optax.tree.get(state, "mu")
  assert adam.keys() == trained.keys()


@pytest.mark.parametrize("platform, kind, said", [
    ("cpu", "cpu", set()), ("cuda", "NVIDIA H100", set()),
    ("tpu", "TPU v4", {"xla_jf_spmd_threshold_for_windowed_einsum_mib"}),
    ("tpu", "TPU v5", {"xla_jf_spmd_threshold_for_windowed_einsum_mib", "xla_tpu_scoped_vmem_limit_kib"})])
def test_what_the_compiler_is_told_goes_by_the_device(platform, kind, said):
  device = types.SimpleNamespace(platform=platform, device_kind=kind)
  assert set(compiler_options(types.SimpleNamespace(devices=np.array([[device]])))) == said


def test_the_temperature_stays_within_its_bounds():
  """However large the update, it ends at a bound; below and above."""
  config = tiny.make_config("align", optimizer__peak_lr=100.0, optimizer__warmup_fraction=0.0,
                            stage__model__temperature_bounds=(0.05, 0.09))
  plan, mesh = tiny.make_plan(config), tiny.one_device_mesh(config)
  assert plan.bounds == {"temperature": (0.05, 0.09)}
  step = make_train_step(plan, optax.sgd(1e6), lambda count: jnp.float32(1), mesh)
  trained, frozen = plan.initialise(mesh, 0)
  with jax.set_mesh(mesh):
    state, _ = step(initial_state(plan, optax.sgd(1e6), mesh, trained), frozen,
                    global_batch(mesh, tiny.make_batch(config)), jax.random.key(0))
  assert float(state.parameters["temperature"]) in (pytest.approx(0.05), pytest.approx(0.09))
