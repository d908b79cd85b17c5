"""The train step: gradients of the trained parameters over microbatches, one update, metrics. Pure, jitted, donated."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lyrics_jax.stages.base import Batch, Loss
from lyrics_jax.training.compiler import compiler_options
from lyrics_jax.training.parameters import ParameterPlan, Parameters
from lyrics_jax.training.sharding import BATCH


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """What a step changes. `step`: int32[], the number of updates done."""
  step: jax.Array
  parameters: Parameters
  optimizer: optax.OptState


def make_train_step(plan: ParameterPlan, optimizer: optax.GradientTransformation, schedule: optax.Schedule, mesh: Mesh) -> Callable:
  """`train_step(state, frozen, batch, key) -> (state, metrics)`; the state is donated.

  The key of a step is derived from the run's key and the step number, so that a resumed run repeats an uninterrupted one.
  An update whose loss or gradient is not finite is not applied; `metrics["finite"]` says so.
  """
  stage, microbatches = plan.stage, plan.stage.config.optimizer.accumulate_steps

  def gradients(parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array):
    def objective(parameters):
      loss: Loss = stage.loss(plan.model(parameters, frozen), batch, key)
      return loss.value * loss.weight, loss

    (_, loss), gradient = jax.value_and_grad(objective, has_aux=True)(parameters)
    return gradient, loss.weight, {"loss": loss.value, **loss.metrics}

  def train_step(state: TrainState, frozen: Parameters, batch: Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step)
    if microbatches == 1:
      gradient, weight, metrics = gradients(state.parameters, frozen, batch, key)
    else:
      gradient, weight, metrics = _accumulate(
          lambda batch, key: gradients(state.parameters, frozen, batch, key), batch, key, microbatches, mesh)
    gradient = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-6), gradient)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

    updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.parameters)
    new_parameters = optax.apply_updates(state.parameters, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    metrics |= {"gradient_norm": norm, "learning_rate": schedule(state.step), "finite": finite}
    new_state = TrainState(state.step + 1, keep(new_parameters, state.parameters), keep(new_optimizer, state.optimizer))
    return new_state, metrics

  shardings = plan.shardings(mesh)
  everywhere = NamedSharding(mesh, PartitionSpec())
  state_shardings = state_sharding(plan, optimizer, mesh)
  frozen_shardings = {path: shardings[path] for path in plan.paths(trained=False)}
  return jax.jit(train_step, donate_argnums=0,
                 in_shardings=(state_shardings, frozen_shardings, NamedSharding(mesh, BATCH), everywhere),
                 out_shardings=(state_shardings, everywhere), compiler_options=compiler_options(mesh))


def state_sharding(plan: ParameterPlan, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Shardings of the train state: the optimizer's moments lie with their parameters."""
  shardings = plan.shardings(mesh)
  everywhere = NamedSharding(mesh, PartitionSpec())
  trained = {path: shardings[path] for path in plan.paths(trained=True)}
  abstract = jax.eval_shape(optimizer.init, {path: plan.shapes[path] for path in trained})
  moments = optax.tree.map_params(optimizer, lambda _, sharding: sharding, abstract, trained,
                                  transform_non_params=lambda _: everywhere)
  return TrainState(everywhere, trained, moments)


def initial_state(plan: ParameterPlan, optimizer: optax.GradientTransformation, mesh: Mesh, parameters: Parameters) -> TrainState:
  sharding = state_sharding(plan, optimizer, mesh)
  moments = jax.jit(optimizer.init, out_shardings=sharding.optimizer)(parameters)
  return TrainState(jax.device_put(jnp.int32(0), sharding.step), parameters, moments)


def _accumulate(gradients: Callable, batch: Batch, key: jax.Array, microbatches: int, mesh: Mesh):
  """Sums gradients over microbatches; metrics are averaged with the microbatches' weights.

  Every device keeps its own rows: microbatch m takes the m-th part of each device's share, so that nothing moves.
  """
  shards = mesh.shape["data"] * mesh.shape["fsdp"]

  def fold(x):
    x = x.reshape(shards, microbatches, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(microbatches, -1, *x.shape[3:])

  def body(total, slices):
    gradient, weight, metrics = gradients(*slices)
    weighted = (gradient, weight, jax.tree.map(lambda m: m * weight, metrics))
    return jax.tree.map(jnp.add, total, weighted), None

  slices = (jax.tree.map(fold, batch), jax.random.split(key, microbatches))
  shapes = jax.eval_shape(lambda s: gradients(*jax.tree.map(lambda a: a[0], s)), slices)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (gradient, weight, metrics), _ = jax.lax.scan(body, zeros, slices)
  return gradient, weight, jax.tree.map(lambda m: m / jnp.maximum(weight, 1e-6), metrics)
