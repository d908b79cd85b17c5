"""Modules of ours with the parameters that a source gives."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def built(make, values, prefix):
  """The graph and state of the module with the parameters below `prefix`; what is missing is not a number, and would show."""
  graph, state = nnx.split(nnx.eval_shape(make))
  unknown = lambda variable: np.full(variable.shape, np.nan, np.float32)
  value = lambda path, variable: jnp.asarray(values.get("/".join([prefix, *map(str, path)]), unknown(variable)), jnp.float32)
  return graph, nnx.from_flat_state([(path, variable.replace(value(path, variable)))
                                     for path, variable in nnx.to_flat_state(state)])
