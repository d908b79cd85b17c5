"""The linear map, in the three forms that attention needs, and in int8.

Attention wants heads before tokens. Turning a product's result around copies a whole array twice on a TPU, so the
product
itself lays out the heads: `to_heads=H` maps [B, T, n] -> [B, H, T, d], and `from_heads=H` maps [B, H, T, d] -> [B, T,
  m].
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from lyrics_jax.models.layers.int8 import quantise
from lyrics_jax.models.layers.parameter import Array, LogicalAxes, lecun_normal, parameter, zeros


class Linear(nnx.Module):
  """x: [..., n] -> [..., m], by a `kernel` whose name stands for [n, m].

  For `to_heads` the kernel lies in memory as [m, n]: heads are then rows of the matrix, which a TPU splits where they
  lie. Checkpoints know nothing of this: `training/checkpoint.py` turns such a matrix around. With `int8` the matrix is
  quantised (see `int8.py`) and cannot be trained.

  Args:
    axes: the logical axes of n and of m.
    to_heads, from_heads: number of heads, H*d = m or H*d = n; at most one of the two.
  """

  def __init__(self, n: int, m: int, axes: LogicalAxes, *, rngs: nnx.Rngs, bias: bool = True,
               init: Callable = lecun_normal, bias_init: Callable = zeros, int8: bool = False,
               to_heads: int | None = None, from_heads: int | None = None):
    self.to_heads, self.from_heads = to_heads, from_heads
    if to_heads is None:
      kernel = parameter(rngs, init, (n, m), axes)
    else:
      kernel = parameter(rngs, _outputs_first(init), (m, n), axes[::-1], transposed=True)
    self.kernel, self.kernel_scale = _quantised(kernel, axes[1]) if int8 else (kernel, None)
    self.bias = parameter(rngs, bias_init, (m,), (axes[1],)) if bias else None

  def __call__(self, x: Array, key: Array | None = None) -> Array:
    """`key` is for dropout, which only `lora.py` has."""
    kernel = self.kernel[...].astype(x.dtype)
    if self.to_heads is not None:
      return self._finish(product_to_heads(x, kernel, self.to_heads), (self.to_heads, 1, -1))
    if self.from_heads is not None:
      return self._finish(product_from_heads(x, kernel), (-1,))
    return self._finish(jnp.matmul(x, kernel), (-1,))

  def _finish(self, y: Array, shape: tuple[int, ...]) -> Array:
    """Scales and biases, [m] each, applied to y; in `shape` they broadcast with it."""
    if self.kernel_scale is not None:
      y = y * self.kernel_scale[...].reshape(shape).astype(y.dtype)
    return y if self.bias is None else y + self.bias[...].reshape(shape).astype(y.dtype)


def _outputs_first(init: Callable) -> Callable:
  """The initialiser of an [n, m] matrix for one that lies as [m, n]: the same numbers, turned around."""
  def turned(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    return init(key, shape[::-1], dtype).T

  return turned


def _quantised(kernel: nnx.Param, outputs: str | None) -> tuple[nnx.Param, nnx.Param]:
  """The kernel in int8 and its scale; `outputs`: the logical axis of m."""
  metadata = kernel.get_metadata()
  transposed = metadata.get("transposed", False)
  values, scale = quantise(kernel[...], -1 if transposed else -2)
  return (nnx.Param(values, logical_axes=metadata["logical_axes"], keeps_dtype=True, transposed=transposed),
          nnx.Param(scale, logical_axes=(outputs,), keeps_dtype=True))


def product_to_heads(x: Array, kernel: Array, heads: int) -> Array:
  """[B, T, n], [H*d, n] or [H, d, n] -> [B, H, T, d] in the dtype of x."""
  return jnp.einsum("btn,hdn->bhtd", x, kernel.reshape(heads, -1, x.shape[-1]))


def product_from_heads(x: Array, kernel: Array) -> Array:
  """[B, H, T, d], [H*d, m] or [H, d, m] -> [B, T, m] in the dtype of x."""
  return jnp.einsum("bhtd,hdm->btm", x, kernel.reshape(x.shape[1], x.shape[3], -1))


def split_heads(x: Array, heads: int) -> Array:
  """[..., T, H*d] -> [..., T, H, d]."""
  return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Array) -> Array:
  """[..., T, H, d] -> [..., T, H*d]."""
  return x.reshape(*x.shape[:-2], -1)
