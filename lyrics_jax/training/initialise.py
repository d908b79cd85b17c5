"""Where a run's first parameters come from."""

import jax
from absl import logging
from jax.sharding import Mesh

from lyrics_jax.training.checkpoint import Checkpoints, open_run
from lyrics_jax.training.parameters import ParameterPlan, Parameters
from refiner_export.settings import require


def initial_parameters(plan: ParameterPlan, mesh: Mesh, checkpoints: Checkpoints) -> tuple[Parameters, Parameters]:
  """(trained, frozen): fresh ones, replaced by `config.init_from`'s where names and shapes agree, and the run's own frozen ones."""
  config = plan.stage.config
  shardings = plan.shardings(mesh)
  trained, frozen = plan.initialise(mesh, config.seed)
  if config.init_from and checkpoints.latest() is None:
    trained, frozen = plan.split(_inherit(plan, trained | frozen, config.init_from, shardings))
  own = checkpoints.restore_frozen({path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[path])
                                    for path, value in frozen.items()})
  return trained, frozen | own


def _inherit(plan: ParameterPlan, fresh: Parameters, source: str, shardings) -> Parameters:
  earlier, _ = open_run(source)
  saved = earlier.restore_parameters() | earlier.restore_frozen()
  earlier.close()
  taken = {path: value for path, value in saved.items() if path in fresh}
  for path, value in taken.items():
    require(value.shape == fresh[path].shape, f"config.init_from={source}: parameter {path} has shape {value.shape} there, "
                                              f"{fresh[path].shape} here; make config.model agree")
  require(bool(taken), f"config.init_from={source}: no parameter of that run has a place in this model")
  logging.info("%d parameters from %s; initialised: %s; left over: %s", len(taken), source,
               _parts(set(fresh) - set(taken)), _parts(set(saved) - set(taken)))
  return fresh | {path: jax.device_put(value.astype(fresh[path].dtype), shardings[path]) for path, value in taken.items()}


def _parts(paths: set[str]) -> str:
  return ", ".join(sorted({path.split("/")[0] for path in paths})) or "none"
