"""Frozen kernels in int8: symmetric, one float32 scale per output channel (the absmax scheme of Dettmers et al. 2022).

A kernel `W` [..., n, m] is stored as `round(W / s)` with `s = max |W| / 127` over the n inputs, so that each weight is off
by at most s / 2 and an output by at most `s / 2 * sum |x|`. A column has one scale: x W = (x round(W / s)) s, and no kernel
is ever there in a longer dtype than that of the product.

Qwix does the same for models that it may run and rewrite: its `quantize_model` replaces parameters during a forward pass,
which NNX refuses inside `jax.lax.scan` (TraceContextError), and what it leaves are boxes, not arrays by path.
"""

import jax
import jax.numpy as jnp

SCALE = "_scale"  # what follows a kernel's path in that of its scale


def inputs_axis(path: str) -> int:
  """Over which axis the linear map with this parameter sums: a `kernel` is [..., n, m], a `weight` [..., m, n]."""
  return -1 if path.endswith("/weight") else -2


def quantise(matrix: jax.Array, inputs: int = -2) -> tuple[jax.Array, jax.Array]:
  """float[..., n, m] -> int8[..., n, m] and the scales float32[..., m]. `inputs`: the axis of n, -2 or -1."""
  matrix = matrix.astype(jnp.float32)
  largest = jnp.abs(matrix).max(inputs)
  scale = jnp.where(largest > 0, largest / 127, 1)
  return jnp.round(matrix / jnp.expand_dims(scale, inputs)).astype(jnp.int8), scale


def dequantise(matrix: jax.Array, scale: jax.Array, inputs: int = -2) -> jax.Array:
  """The float32 matrix of `quantise`, each weight within half of its scale."""
  return matrix.astype(jnp.float32) * jnp.expand_dims(scale, inputs)
