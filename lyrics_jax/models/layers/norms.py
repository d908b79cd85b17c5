"""Layer norm and root-mean-square norm, both computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.models.layers.parameter import Array, ones, parameter, zeros


class LayerNorm(nnx.Module):
  """[..., D] -> [..., D] in the dtype of the input."""

  def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
    self.scale = parameter(rngs, ones, (width,), (None,))
    self.bias = parameter(rngs, zeros, (width,), (None,))
    self.eps = eps

  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
  """[..., D] -> [..., D] in the dtype of the input."""

  def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
    self.scale = parameter(rngs, ones, (width,), (None,))
    self.eps = eps

  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * self.scale[...]).astype(x.dtype)
