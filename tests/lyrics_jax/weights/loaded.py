"""Values out of an origin, and modules of ours with them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lyrics_jax.weights.table import Origin


def values_of(origin: Origin) -> dict[str, np.ndarray]:
  """Everything that an origin has, by path, as it lies there."""
  values = {}
  for path in origin.paths():
    values[path] = origin.read(path)
  return values


def built(make, values, prefix):
  """The graph and state of the module with the parameters below `prefix`.

  What is missing is not a number, and would show. Kernels are given as checkpoints have them.
  """
  graph, state = nnx.split(nnx.eval_shape(make))
  filled = []
  for path, variable in nnx.to_flat_state(state):
    name = "/".join([prefix, *map(str, path)]) if prefix else "/".join(map(str, path))
    transposed = variable.get_metadata().get("transposed", False)
    if name in values:
      value = np.swapaxes(values[name], -1, -2) if transposed else values[name]
    else:
      value = np.full(variable.shape, np.nan, np.float32)
    filled.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
  return graph, nnx.from_flat_state(filled)
