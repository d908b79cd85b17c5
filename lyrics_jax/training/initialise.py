"""Where a run's first parameters come from."""

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lyrics_jax.weights import blip2
from lyrics_jax.weights.read import holds_weights
from lyrics_jax.weights.table import UNKNOWN, Found, part
from lyrics_jax.models.quantised import SCALE, dequantise, inputs_axis, quantise
from lyrics_jax.training.checkpoint import Checkpoints, open_run
from lyrics_jax.training.parameters import ParameterPlan, Parameters
from refiner_export.common.settings import existing_path, require


def initial_parameters(plan: ParameterPlan, mesh: Mesh, checkpoints: Checkpoints) -> tuple[Parameters, Parameters]:
  """(trained, frozen): fresh ones, replaced by what `config.init_from` has for them, and the run's own frozen ones."""
  config = plan.stage.config
  shardings = plan.shardings(mesh)
  start = config.init_from and checkpoints.latest() is None
  found = _find(plan, config.init_from, mesh) if start else Found({}, {})
  whole = {path for path, value in found.values.items() if value.shape == plan.shapes[path].shape}
  whole |= {path + SCALE for path in whole}
  parameters = plan.fresh(mesh, config.seed, [path for path in plan.shapes if path not in whole])
  for path, value in found.values.items():
    parameters |= _placed(path, value, plan, parameters, shardings)
  trained, frozen = plan.split(parameters)
  own = checkpoints.restore_frozen({path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[path])
                                    for path, value in frozen.items()})
  return trained, frozen | own


def _find(plan: ParameterPlan, source: str, mesh: Mesh) -> Found:
  """What `config.init_from` has for this model; logs it."""
  path = existing_path(source, "config.init_from", "Name the output directory of an earlier run, or BLIP-2's weights: a "
                                                   "file, or a Hugging Face directory")
  if holds_weights(path):
    found = blip2.load(path, plan.stage.config.model, plan.shapes)
  else:
    found = _earlier_run(plan, source, mesh)
  # A scale comes with its kernel.
  stated = {path: shape for path, shape in plan.shapes.items() if not path.endswith(SCALE)}
  logging.info("parameters from %s\n%s", source, found.report(stated))
  if UNKNOWN in found.left_over:
    logging.warning("%s: unknown, and not loaded: %s", source, ", ".join(found.left_over[UNKNOWN]))
  at_random = {part(path) for path in plan.paths(trained=False) if path in stated and path not in found.values}
  if at_random:
    logging.warning("frozen with random values, because %s has nothing for it: %s", source, ", ".join(sorted(at_random)))
  return found


def _earlier_run(plan: ParameterPlan, source: str, mesh: Mesh) -> Found:
  """What an earlier run has, each device's part read onto that device: on no host need there be all of it."""
  earlier, _ = open_run(source)
  saved = earlier.stored_shapes()
  for path in saved.keys() & plan.shapes.keys():
    there, here = saved[path].shape, plan.shapes[path].shape
    require(there == here, f"config.init_from={source}: parameter {path} has shape {there} there, {here} here; "
                           f"make config.model agree")
  wanted = [path for path in saved if path.removesuffix(SCALE) in plan.shapes]
  require(bool(wanted), f"config.init_from={source}: no parameter of that run has a place in this model")
  shardings, everywhere = plan.shardings(mesh), NamedSharding(mesh, PartitionSpec())
  taken = earlier.restore_some({
      path: jax.ShapeDtypeStruct(saved[path].shape, saved[path].dtype, sharding=shardings.get(path, everywhere))
      for path in wanted})
  earlier.close()
  for path in [path for path in taken if path + SCALE in taken and path + SCALE not in plan.shapes]:
    taken[path] = dequantise(taken[path], taken.pop(path + SCALE), inputs_axis(path))
  left_over = sorted(set(saved) - set(wanted))
  return Found(taken, {"without a place in this model": left_over} if left_over else {})


def _placed(path: str, value: np.ndarray | jax.Array, plan: ParameterPlan, fresh: Parameters,
            shardings: dict[str, NamedSharding]) -> Parameters:
  """The value, laid out, in the plan's dtype, with the rows of the fresh one from there on; with a scale where that has one."""
  if path + SCALE in plan.shapes and value.dtype != jnp.int8:  # quantised where it lies: a scale is that of a whole column
    matrix, scale = jax.jit(quantise, static_argnums=1, out_shardings=(shardings[path], shardings[path + SCALE]))(
        jax.device_put(value, shardings[path]), inputs_axis(path))
    return {path: matrix, path + SCALE: scale}
  like, value = plan.shapes[path], value.astype(plan.shapes[path].dtype)
  whole = value if value.shape == like.shape else fresh[path].at[:len(value)].set(value)
  return {path: jax.device_put(whole, shardings[path])}
