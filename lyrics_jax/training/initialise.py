"""Where a run's first parameters come from: fresh ones, an earlier run, or published weights."""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from lyrics_jax.models.layers.int8 import SCALE, quantise
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.parameters import ModelParameters, Parameters, part


class Origin(Protocol):
  """Weights that a run starts from. Shapes are as checkpoints have them. `weights/sources.py` finds origins.

  Attributes:
    name: the file or directory, for messages.
    unknown: names of tensors that such a file is not expected to have.
  """
  name: str
  unknown: list[str]

  def paths(self) -> list[str]:
    """The parameters of this model that the origin has."""

  def shape(self, path: str) -> tuple[int, ...]:
    """The shape of a parameter in the origin, which may have fewer rows than the model's parameter."""

  def read(self, path: str, sharding: NamedSharding | None = None, dtype: jnp.dtype | None = None,
           transposed: bool = False) -> np.ndarray | jax.Array:
    """A parameter. With a sharding, each device gets its own part; without, all of it is in this host's memory.

    Args:
      dtype: None gives that of the origin.
      transposed: whether the last two axes change places. `sharding` is then that of the turned array.
    """

  def report(self, shapes) -> str:
    """What was loaded, initialised and left over, as lines for a person."""


def initial_parameters(parameters: ModelParameters, mesh: Mesh, checkpoints: Checkpoints,
                       origin: Origin | None) -> tuple[Parameters, Parameters]:
  """The first (trained, frozen) parameters of a run, as they lie in memory.

  They are what the origin has; parameters that it lacks are fresh. Frozen parameters that the run has already saved
  replace both.
  """
  values = {} if origin is None else _read(parameters, mesh, origin)
  missing = [path for path in parameters.shapes if path not in values]
  fresh = parameters.fresh(mesh, parameters.config.seed, missing)
  if origin is not None:
    for path in _partial(parameters, origin):
      fresh[path] = _with_first_rows(fresh[path], origin.read(path, dtype=fresh[path].dtype))
    _tell(parameters, origin)
  trained, frozen = parameters.split(values | fresh)
  return trained, frozen | checkpoints.restore_frozen(parameters, parameters.shardings(mesh, stored=True))


def _partial(parameters: ModelParameters, origin: Origin) -> list[str]:
  """The parameters of which the origin has only the first rows, such as the words of a smaller vocabulary."""
  return [path for path in origin.paths() if origin.shape(path) != parameters.shapes[path].shape]


def _read(parameters: ModelParameters, mesh: Mesh, origin: Origin) -> Parameters:
  """What the origin has whole, in the model's dtypes, on the devices where it will lie."""
  shardings, partial, values = parameters.shardings(mesh), _partial(parameters, origin), {}
  for path in origin.paths():
    if path in partial:
      continue
    dtype, transposed = parameters.shapes[path].dtype, path in parameters.transposed
    scale = path + SCALE
    if scale in parameters.shapes and scale not in origin.paths():
      # Quantised on the devices: a scale needs a whole column, of which a device may read only a part.
      value = origin.read(path, shardings[path], None, transposed)
      quantise_here = jax.jit(quantise, static_argnums=1, out_shardings=(shardings[path], shardings[scale]))
      values[path], values[scale] = quantise_here(value, -1 if transposed else -2)
    else:
      values[path] = origin.read(path, shardings[path], dtype, transposed)
  return values


def _with_first_rows(whole: jax.Array, rows: np.ndarray) -> jax.Array:
  """`whole` with its first rows replaced."""
  return jax.device_put(whole.at[:len(rows)].set(rows), whole.sharding)


def _tell(parameters: ModelParameters, origin: Origin) -> None:
  """Logs what is loaded, and warns of frozen parts that stay random."""
  known, random, stated = set(origin.paths()), set(), {}
  for path, shape in parameters.shapes.items():
    if path.endswith(SCALE):
      continue  # it goes with its kernel
    stated[path] = shape
    if path not in known and not parameters.config.stage.trains(path):
      random.add(part(path))
  logging.info("parameters from %s\n%s", origin.name, origin.report(stated))
  if origin.unknown:
    logging.warning("%s: unknown, and not loaded: %s", origin.name, ", ".join(origin.unknown))
  if random:
    logging.warning("frozen with random values, because %s has nothing for it: %s", origin.name,
                    ", ".join(sorted(random)))
