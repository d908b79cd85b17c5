"""Building blocks: linear maps, norms, attention, dropout, and a stack of equal blocks that is scanned over.

Parameters are float32 and carry `logical_axes`, one name or None per dimension, which `training/sharding.py` maps to mesh
axes. A layer computes in the dtype of its input; softmax and norms are float32 inside.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.config import Remat

Array = jax.Array
LogicalAxes = Sequence[str | None]

lecun_normal = jax.nn.initializers.lecun_normal()
xavier_uniform = jax.nn.initializers.xavier_uniform()
normal = jax.nn.initializers.normal(0.02)


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: LogicalAxes) -> nnx.Param:
  """A float32 parameter; `axes` names each dimension for sharding."""
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(rngs.params(), shape, jnp.float32), logical_axes=tuple(axes))


class Linear(nnx.Module):
  """x: [..., n] -> [..., m]."""

  def __init__(self, n: int, m: int, axes: LogicalAxes, *, rngs: nnx.Rngs, bias: bool = True, init: Callable = lecun_normal):
    self.kernel = parameter(rngs, init, (n, m), axes)
    self.bias = parameter(rngs, jax.nn.initializers.zeros, (m,), (axes[1],)) if bias else None

  def __call__(self, x: Array) -> Array:
    y = x @ self.kernel[...].astype(x.dtype)
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
  """ids: int32[...] -> float32[..., D]; `logits` is the tied output map."""

  def __init__(self, rows: int, width: int, axes: LogicalAxes = ("vocab", "embed"), *, rngs: nnx.Rngs):
    self.embedding = parameter(rngs, normal, (rows, width), axes)

  def __call__(self, ids: Array) -> Array:
    return jnp.take(self.embedding[...], ids, axis=0)

  def logits(self, x: Array) -> Array:
    """x: [..., D] -> float32[..., rows]."""
    return jnp.einsum("...d,vd->...v", x, self.embedding[...].astype(x.dtype), preferred_element_type=jnp.float32)


class LayerNorm(nnx.Module):
  def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
    self.scale = parameter(rngs, jax.nn.initializers.ones, (width,), (None,))
    self.bias = parameter(rngs, jax.nn.initializers.zeros, (width,), (None,))
    self.eps = eps

  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
  def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
    self.scale = parameter(rngs, jax.nn.initializers.ones, (width,), (None,))
    self.eps = eps

  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * self.scale[...]).astype(x.dtype)


def split_heads(x: Array, heads: int) -> Array:
  """[..., T, H*d] -> [..., T, H, d]."""
  return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Array) -> Array:
  """[..., T, H, d] -> [..., T, H*d]."""
  return x.reshape(*x.shape[:-2], -1)


def attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
  """Scaled dot-product attention, softmax in float32.

  Args:
    query: [B, Tq, H, d]. key, value: [B, Tk, K, d], K dividing H (grouped queries).
    mask: bool[B, 1, Tq, Tk], True where the query may look, or None for everywhere.

  Returns:
    [B, Tq, H, d]; zero for a query that may look nowhere, so that an absent source adds nothing.
  """
  out = jax.nn.dot_product_attention(query, key, value, mask=mask)
  if mask is not None:
    out = jnp.where(mask.any(-1)[:, 0, :, None, None], out, 0)
  return out


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Inverted dropout; without a key (evaluation) the identity."""
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: Array | None, count: int) -> Sequence[Array | None]:
  """`count` independent keys, or as many Nones when there is no key."""
  return [None] * count if key is None else jax.random.split(key, count)


_REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Stack(nnx.Module):
  """`depth` equal blocks; every parameter has a leading axis of that length, and `scan` compiles one block only."""

  def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
    self.blocks = nnx.vmap(make_block, in_axes=0, out_axes=0)(rngs.fork(split=depth))
    self.depth = depth

  def scan(self, step: Callable, carry, xs=None, *, key: Array | None = None, remat: Remat = "none"):
    """Applies `step(block, carry, x, key) -> (carry, y)` block after block.

    Args:
      xs: pytree whose leaves have a leading axis of length `depth`, one slice per block.
      key: random key, split into one per block.
      remat: what the backward pass recomputes: nothing, everything, or everything but matrix products.

    Returns:
      The last carry, and the stacked ys.
    """
    graph, parameters = nnx.split(self.blocks)
    keys = None if key is None else jax.random.split(key, self.depth)

    def body(carry, slices):
      block_parameters, x, block_key = slices
      return step(nnx.merge(graph, block_parameters), carry, x, block_key)

    if remat != "none":
      body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, (parameters, xs, keys), length=self.depth)


def parameter_count(shapes: Sequence[tuple[int, ...]]) -> int:
  return sum(math.prod(shape) for shape in shapes)
