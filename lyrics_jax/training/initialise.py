"""Where a run's first parameters come from."""

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from lyrics_jax.hf import blip2
from lyrics_jax.hf.read import holds_weights
from lyrics_jax.hf.table import UNKNOWN, Found, part
from lyrics_jax.training.checkpoint import Checkpoints, open_run
from lyrics_jax.training.parameters import ParameterPlan, Parameters
from refiner_export.settings import existing_path, require


def initial_parameters(plan: ParameterPlan, mesh: Mesh, checkpoints: Checkpoints) -> tuple[Parameters, Parameters]:
  """(trained, frozen): fresh ones, replaced by what `config.init_from` has for them, and the run's own frozen ones."""
  config = plan.stage.config
  shardings = plan.shardings(mesh)
  found = _find(plan, config.init_from) if config.init_from and checkpoints.latest() is None else Found({}, {})
  trained, frozen = plan.initialise(mesh, config.seed)
  fresh = trained | frozen
  trained, frozen = plan.split(fresh | {path: _placed(value, fresh[path], shardings[path])
                                        for path, value in found.values.items()})
  own = checkpoints.restore_frozen({path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[path])
                                    for path, value in frozen.items()})
  return trained, frozen | own


def _find(plan: ParameterPlan, source: str) -> Found:
  """What `config.init_from` has for this model; logs it."""
  path = existing_path(source, "config.init_from", "Name the output directory of an earlier run, or BLIP-2's weights: a "
                                                   "file, or a Hugging Face directory")
  found = blip2.load(path, plan.stage.config.model, plan.shapes) if holds_weights(path) else _earlier_run(plan, source)
  logging.info("parameters from %s\n%s", source, found.report(plan.shapes))
  if UNKNOWN in found.left_over:
    logging.warning("%s: unknown, and not loaded: %s", source, ", ".join(found.left_over[UNKNOWN]))
  at_random = {part(path) for path in plan.paths(trained=False) if path not in found.values}
  if at_random:
    logging.warning("frozen with random values, because %s has nothing for it: %s", source, ", ".join(sorted(at_random)))
  return found


def _earlier_run(plan: ParameterPlan, source: str) -> Found:
  earlier, _ = open_run(source)
  saved = earlier.restore_parameters() | earlier.restore_frozen()
  earlier.close()
  taken = {path: value for path, value in saved.items() if path in plan.shapes}
  for path, value in taken.items():
    here = plan.shapes[path].shape
    require(value.shape == here, f"config.init_from={source}: parameter {path} has shape {value.shape} there, {here} here; "
                                 f"make config.model agree")
  require(bool(taken), f"config.init_from={source}: no parameter of that run has a place in this model")
  left_over = sorted(set(saved) - set(taken))
  return Found(taken, {"without a place in this model": left_over} if left_over else {})


def _placed(value: np.ndarray | jax.Array, fresh: jax.Array, sharding: NamedSharding) -> jax.Array:
  """The value with the dtype of `fresh` and its rows from there on, laid out."""
  value = value.astype(fresh.dtype)
  return jax.device_put(value if value.shape == fresh.shape else fresh.at[:len(value)].set(value), sharding)
