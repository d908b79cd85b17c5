"""The train step: gradients of the trained parameters over microbatches, one update, metrics.

The step is one pure function, compiled by `jax.jit`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from lyrics_jax.sharding import BATCH, batch_shards, everywhere
from lyrics_jax.training.compiler import compiler_options
from lyrics_jax.training.parameters import ModelParameters, Parameters

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """What a step changes. `step`: int32[], the number of updates that are done."""
  step: jax.Array
  parameters: Parameters
  optimizer: optax.OptState


def make_train_step(parameters: ModelParameters, optimizer: optax.GradientTransformation, schedule: optax.Schedule,
                    mesh: Mesh) -> Callable:
  """`train_step(state, frozen, batch, key) -> (state, metrics)`; the state is donated.

  A step's random key follows from the run's key and the number of the step, so that a resumed run repeats an
  uninterrupted one. An update whose loss or gradient is not finite is not applied; `metrics["finite"]` says so.

  Raises:
    UserError: the mesh does not divide a dimension of a parameter.
  """
  stage, microbatches = parameters.config.stage, parameters.config.optimizer.accumulate_steps

  def gradients(trained: Parameters, frozen: Parameters, batch: Batch, key: jax.Array):
    def objective(trained: Parameters):
      loss = stage.loss(parameters.model(trained, frozen), batch, key)
      return loss.value * loss.weight, loss

    (_, loss), gradient = jax.value_and_grad(objective, has_aux=True)(trained)
    return gradient, loss.weight, {"loss": loss.value, **loss.metrics}

  def train_step(state: TrainState, frozen: Parameters, batch: Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step)

    def of_microbatch(batch: Batch, key: jax.Array):
      return gradients(state.parameters, frozen, batch, key)

    if microbatches == 1:
      gradient, weight, metrics = of_microbatch(batch, key)
    else:
      gradient, weight, metrics = _accumulate(of_microbatch, batch, key, microbatches, mesh)
    gradient = _divided(gradient, weight)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

    updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.parameters)
    new_parameters = optax.apply_updates(state.parameters, updates)
    for path, (low, high) in parameters.bounds.items():
      if path in new_parameters:
        new_parameters[path] = jnp.clip(new_parameters[path], low, high)
    kept = _where(finite, (new_parameters, new_optimizer), (state.parameters, state.optimizer))
    metrics |= {"gradient_norm": norm, "learning_rate": schedule(state.step), "finite": finite}
    return TrainState(state.step + 1, *kept), metrics

  shardings, state_shardings = parameters.shardings(mesh), state_sharding(parameters, optimizer, mesh)
  _, frozen_shardings = parameters.split(shardings)
  return jax.jit(train_step, donate_argnums=0,
                 in_shardings=(state_shardings, frozen_shardings, NamedSharding(mesh, BATCH), everywhere(mesh)),
                 out_shardings=(state_shardings, everywhere(mesh)), compiler_options=compiler_options(mesh))


def _where(condition: jax.Array, new, old):
  """Each leaf of `new` if the condition, bool[], holds, else that of `old`."""
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _divided(tree, weight: jax.Array):
  """Each leaf divided by the weight, float32[]. A sum over nothing has the weight 0 and stays 0."""
  return jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-6), tree)


def state_sharding(parameters: ModelParameters, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Shardings of the train state: the optimizer's moments lie with their parameters, its counters everywhere."""
  trained, _ = parameters.split(parameters.shardings(mesh))
  memory, _ = parameters.split(parameters.memory)
  abstract = jax.eval_shape(optimizer.init, memory)

  def of_moment(_, sharding: NamedSharding) -> NamedSharding:
    return sharding

  def of_counter(_) -> NamedSharding:
    return everywhere(mesh)

  moments = optax.tree.map_params(optimizer, of_moment, abstract, trained, transform_non_params=of_counter)
  return TrainState(everywhere(mesh), trained, moments)


def initial_state(parameters: ModelParameters, optimizer: optax.GradientTransformation, mesh: Mesh,
                  trained: Parameters) -> TrainState:
  """The state before the first step."""
  sharding = state_sharding(parameters, optimizer, mesh)
  moments = jax.jit(optimizer.init, out_shardings=sharding.optimizer)(trained)
  return TrainState(jax.device_put(jnp.int32(0), sharding.step), trained, moments)


def _accumulate(gradients: Callable, batch: Batch, key: jax.Array, microbatches: int, mesh: Mesh):
  """The sums of gradients and weights over microbatches, and the metrics' means by weight.

  Microbatch m takes the m-th part of the rows of each device, so that no row moves to another device.
  """
  shards = batch_shards(mesh)

  def fold(x: jax.Array) -> jax.Array:
    x = x.reshape(shards, microbatches, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(microbatches, -1, *x.shape[3:])

  def weighted(batch: Batch, key: jax.Array):
    gradient, weight, metrics = gradients(batch, key)
    return gradient, weight, jax.tree.map(lambda m: m * weight, metrics)

  def add(total, of_microbatch):
    return jax.tree.map(jnp.add, total, weighted(*of_microbatch)), None

  slices = jax.tree.map(fold, batch), jax.random.split(key, microbatches)
  first = jax.tree.map(lambda x: x[0], slices)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(weighted, *first))
  (gradient, weight, metrics), _ = jax.lax.scan(add, zeros, slices)
  return gradient, weight, _divided(metrics, weight)
