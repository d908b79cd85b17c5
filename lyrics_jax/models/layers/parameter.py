"""Parameters and their names for sharding."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array
LogicalAxes = Sequence[str | None]

lecun_normal = jax.nn.initializers.lecun_normal()
xavier_uniform = jax.nn.initializers.xavier_uniform()
normal = jax.nn.initializers.normal(0.02)
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: LogicalAxes, **metadata) -> nnx.Param:
  """A float32 parameter; `axes` names each dimension for sharding.

  Args:
    metadata: `keeps_dtype=True` exempts a frozen parameter from the storage dtype of the configuration;
      `transposed=True` says that the matrix lies in memory as [m, n], though its name stands for [n, m];
      `bounds=(low, high)` holds a trained parameter between the two after each update.
  """
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(rngs.params(), shape, jnp.float32), logical_axes=tuple(axes), **metadata)
