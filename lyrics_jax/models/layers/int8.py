"""Frozen matrices in int8: symmetric, one float32 scale per output channel (the absmax scheme of Dettmers et al. 2022).

A kernel `W` [..., n, m] is stored as `round(W / s)` with `s = max |W| / 127` over the n inputs. So each weight is off
by at most s / 2, and an output by at most `s / 2 * sum |x|`. A column has one scale: x W = (x round(W / s)) s, and no
kernel is ever in memory in a longer dtype than that of the product.

Qwix does the same for models that it may run and rewrite. Its `quantize_model` replaces parameters during a forward
pass, which NNX refuses inside `jax.lax.scan` (TraceContextError), and it leaves boxes instead of arrays by path.
"""

import jax
import jax.numpy as jnp

SCALE = "_scale"  # follows a kernel's path in the path of its scale


def quantise(kernel: jax.Array, inputs: int = -2) -> tuple[jax.Array, jax.Array]:
  """float[..., n, m] -> int8[..., n, m] and the scales float32[..., m].

  Args:
    inputs: the axis of n: -2, or -1 for a matrix that lies in memory as [..., m, n].
  """
  kernel = kernel.astype(jnp.float32)
  largest = jnp.abs(kernel).max(inputs)
  scale = jnp.where(largest > 0, largest / 127, 1)
  return jnp.round(kernel / jnp.expand_dims(scale, inputs)).astype(jnp.int8), scale


def dequantise(kernel: jax.Array, scale: jax.Array) -> jax.Array:
  """int8[..., n, m] and float32[..., m] -> float32[..., n, m]; each weight is within half of its scale."""
  return kernel.astype(jnp.float32) * jnp.expand_dims(scale, -2)
