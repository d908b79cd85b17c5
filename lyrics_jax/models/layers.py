"""Building blocks: linear maps, norms, attention, dropout, and a stack of equal blocks that is scanned over.

Parameters are float32 and carry `logical_axes`, one name or None per dimension, which `training/sharding.py` maps to mesh
axes. A layer computes in the dtype of its input; softmax and norms are float32 inside.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lyrics_jax.config import Remat
from lyrics_jax.models.quantised import quantise

Array = jax.Array
LogicalAxes = Sequence[str | None]

lecun_normal = jax.nn.initializers.lecun_normal()
xavier_uniform = jax.nn.initializers.xavier_uniform()
normal = jax.nn.initializers.normal(0.02)

ROWS = ("data", "fsdp")  # the mesh axes over which the rows of a batch are split
# Names of results, by which a remat policy may keep them: of attention, and of a linear map with what was done to it at once.
ATTENTION, LINEAR = "attention", "linear"

_UNSEEN = jnp.finfo(jnp.float32).min  # in place of the score of a key that a query may not see
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: LogicalAxes) -> nnx.Param:
  """A float32 parameter; `axes` names each dimension for sharding.

  Frozen ones are stored in the configuration's dtype, but for those whose metadata says `keeps_dtype`.
  """
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(rngs.params(), shape, jnp.float32), logical_axes=tuple(axes))


class Linear(nnx.Module):
  """x: [..., n] -> [..., m], by a `kernel` [n, m].

  Attention wants heads before tokens. Products lay them out so themselves, where turning their results around would copy a whole
  array twice on a TPU: with `to_heads=H` the map is [B, T, n] -> [B, H, T, d], H*d = m, with `from_heads=H` [B, H, T, d] ->
  [B, T, m], H*d = n. Heads are then rows of the matrix, which a TPU splits where they lie, so for `to_heads` outputs come first:
  it is a `weight` [m, n]. With `int8` the matrix is quantised (see `quantised.py`) and not to be trained.

  Args:
    axes: the logical ones of n and of m.
    key: for dropout, of which there is none here (see `lora.py`).
  """

  def __init__(self, n: int, m: int, axes: LogicalAxes, *, rngs: nnx.Rngs, bias: bool = True, init: Callable = lecun_normal,
               int8: bool = False, to_heads: int | None = None, from_heads: int | None = None):
    self.to_heads, self.from_heads = to_heads, from_heads
    if to_heads is None:
      self.kernel, self.kernel_scale = _matrix(parameter(rngs, init, (n, m), axes), int8, inputs=0)
    else:
      outputs_first = lambda key, shape, dtype: init(key, shape[::-1], dtype).T
      self.weight, self.weight_scale = _matrix(parameter(rngs, outputs_first, (m, n), axes[::-1]), int8, inputs=1)
    self.bias = parameter(rngs, jax.nn.initializers.zeros, (m,), (axes[1],)) if bias else None

  def __call__(self, x: Array, key: Array | None = None) -> Array:
    if self.to_heads is not None:
      return self._scaled(product_to_heads(x, self.weight[...], self.to_heads), self.weight_scale, (self.to_heads, 1, -1))
    product = jnp.matmul if self.from_heads is None else product_from_heads
    return self._scaled(product(x, self.kernel[...].astype(x.dtype)), self.kernel_scale, (-1,))

  def _scaled(self, y: Array, scale: nnx.Param | None, shape: tuple[int, ...]) -> Array:
    """`shape`: in which the outputs' scales and biases, [m], stand beside y."""
    if scale is not None:
      y = y * scale[...].reshape(shape).astype(y.dtype)
    return y if self.bias is None else y + self.bias[...].reshape(shape).astype(y.dtype)


def _matrix(matrix: nnx.Param, int8: bool, inputs: int) -> tuple[nnx.Param, nnx.Param | None]:
  """The parameter of a linear map as it is stored, and its scale; `inputs`: over which axis the map sums."""
  if not int8:
    return matrix, None
  values, scale = quantise(matrix[...], inputs - 2)
  return (nnx.Param(values, logical_axes=matrix.logical_axes, keeps_dtype=True),
          nnx.Param(scale, logical_axes=(matrix.logical_axes[1 - inputs],), keeps_dtype=True))


def product_to_heads(x: Array, weight: Array, heads: int) -> Array:
  """[B, T, n], [H*d, n] or [H, d, n] -> [B, H, T, d] in the dtype of x."""
  return jnp.einsum("btn,hdn->bhtd", x, weight.astype(x.dtype).reshape(heads, -1, x.shape[-1]))


def product_from_heads(x: Array, kernel: Array) -> Array:
  """[B, H, T, d], [H*d, m] or [H, d, m] -> [B, T, m] in the dtype of x."""
  return jnp.einsum("bhtd,hdm->btm", x, kernel.astype(x.dtype).reshape(x.shape[1], x.shape[3], -1))


def _split_rows(blocks: nnx.Module) -> None:
  """Gives the matrices of a stack's blocks, [L, H*d, k], whose rows are heads the shape [L, H, d, k].

  A TPU's compiler reads a layer out of the stack within its product, but not where something stands between: rows that are
  split in the loop are copied first, which at few tokens takes as long as the products. Not so where `fsdp` splits the other
  axis: each layer is gathered before its product, and by heads it would be gathered in an order that has to be turned around.
  """
  mesh = jax.sharding.get_abstract_mesh().shape
  if mesh.get("fsdp", 1) > 1:
    return
  for _, module in nnx.iter_modules(blocks):
    heads = isinstance(module, Linear) and (module.to_heads or module.from_heads)
    if heads and heads % mesh.get("tensor", 1) == 0:  # otherwise a device has parts of heads
      matrix = module.kernel if module.to_heads is None else module.weight
      matrix.set_value(matrix[...].reshape(len(matrix), heads, -1, matrix.shape[-1]))


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
  """`attend_by_head` with tokens first: [B, Tq, H, d], [B, Tk, K, d] twice -> [B, Tq, H, d]."""
  return attend_by_head(*(x.transpose(0, 2, 1, 3) for x in (query, key, value)), mask).transpose(0, 2, 1, 3)


def attend_by_head(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
  """Scaled dot-product attention, softmax in float32.

  No scores are stored: the backward pass computes them again from each query's normaliser, by the formulas of flash
  attention (Dao et al. 2022, section 3.1). Stored scores are the largest arrays of a training step, and writing them costs
  more than the one product that replaces them.

  Args:
    query: [B, H, Tq, d]. key, value: [B, K, Tk, d], K dividing H (grouped queries).
    mask: bool[B, 1, Tq or 1, Tk], True where the query may look, or None for everywhere.

  Returns:
    [B, H, Tq, d]; zero for a query that may look nowhere, so that an absent source adds nothing.
  """
  groups = query.shape[1] // key.shape[1]
  if mask is not None and mask.shape[2] > 1:
    mask = jnp.tile(mask, (1, 1, groups, 1))
  # The queries that share a key stand in one row of its head.
  rows = query.reshape(len(query), key.shape[1], -1, query.shape[3])
  return _attend(rows, key, value, mask).reshape(query.shape)


@jax.custom_vjp
def _attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
  """query: [B, H, Tq, d]; key, value: [B, H, Tk, d]; mask broadcasts to [B, H, Tq, Tk]. Returns [B, H, Tq, d]."""
  return _forward(query, key, value, mask)[0]


def _scores(query: Array, key: Array, mask: Array | None) -> Array:
  scores = _product("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1])
  return scores if mask is None else jnp.where(mask, scores, _UNSEEN)


def _forward(query: Array, key: Array, value: Array, mask: Array | None):
  scores = _scores(query, key, mask)
  largest = scores.max(-1, keepdims=True, initial=_UNSEEN)
  weights = jnp.exp(scores - largest)
  total = weights.sum(-1, keepdims=True)
  out = _product("bhqk,bhkd->bhqd", weights.astype(value.dtype), value) / total
  blind = largest == _UNSEEN
  out = checkpoint_name(jnp.where(blind, 0, out).astype(query.dtype), ATTENTION)
  # An infinite normaliser makes all weights of a query that sees nothing zero in the backward pass.
  normaliser = checkpoint_name(jnp.where(blind, jnp.inf, largest + jnp.log(total)), ATTENTION)
  return out, (query, key, value, mask, normaliser, out)


def _backward(stored, gradient: Array):
  query, key, value, mask, normaliser, out = stored
  weights = jnp.exp(_scores(query, key, mask) - normaliser)
  by_weight = _product("bhqd,bhkd->bhqk", gradient, value)
  along_out = (gradient.astype(jnp.float32) * out).sum(-1, keepdims=True)
  by_score = (weights * (by_weight - along_out) / math.sqrt(query.shape[-1])).astype(query.dtype)
  by_query = _product("bhqk,bhkd->bhqd", by_score, key)
  by_key = _product("bhqk,bhqd->bhkd", by_score, query)
  by_value = _product("bhqk,bhqd->bhkd", weights.astype(value.dtype), gradient)
  return by_query.astype(query.dtype), by_key.astype(key.dtype), by_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Inverted dropout; without a key (evaluation) the identity. The rate is met to 2^-17.

  A random word serves two numbers, and they are drawn once, behind a barrier: where a product takes the result, a TPU's compiler
  would draw them inside it, as often as there are products, and that takes longer than the products of LoRA do.
  """
  if key is None or rate == 0:
    return x
  words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)), jnp.uint32)
  halves = jnp.concatenate([words & 0xffff, words >> 16], axis=-1)[..., :x.shape[-1]]
  keep = jax.lax.optimization_barrier(halves >= round(rate * 2**16))
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: Array | None, count: int) -> Sequence[Array | None]:
  """`count` independent keys, or as many Nones when there is no key."""
  return [None] * count if key is None else jax.random.split(key, count)


def keep_rows(x: Array) -> Array:
  """x: [B, ...], held to the mesh axes of the batch; without a mesh, or where they do not divide B, as it is.

  Without it the compiler may let activations follow the parameters, which `fsdp` splits along the width: every device then
  computes all rows, and each product is summed over all devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.ndim < 2 or x.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


# What is kept of a block for its backward pass besides its input; without a policy, nothing.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(LINEAR, ATTENTION)),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),  # attention is the dearest to compute again
    "full": None,
}


class Stack(nnx.Module):
  """`depth` equal blocks; every parameter has a leading axis of that length, and `scan` compiles one block only."""

  def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
    self.blocks = nnx.vmap(make_block, in_axes=0, out_axes=0)(rngs.fork(split=depth))
    self.depth = depth

  def scan(self, step: Callable, carry, xs=None, *, key: Array | None = None, remat: Remat = "none",
           last: Callable | None = None):
    """Applies `step(block, carry, x, key) -> (carry, y)` block after block.

    Args:
      xs: pytree whose leaves have a leading axis of length `depth`, one slice per block.
      key: random key, split into one per block.
      remat: what the backward pass recomputes: nothing ("none"), everything but linear maps and attention ("dots"), everything
        but attention ("attention"), or everything ("full").
      last: `step` of the last block, where it differs; that block is then compiled for itself and its y dropped.

    Returns:
      The last carry, and the stacked ys.
    """
    blocks = nnx.clone(self.blocks)
    _split_rows(blocks)
    graph, parameters = nnx.split(blocks)
    keys = None if key is None else jax.random.split(key, self.depth)
    slices = parameters, xs, keys

    def body(step):
      def apply(carry, slices):
        block_parameters, x, block_key = slices
        carry, y = step(nnx.merge(graph, block_parameters), jax.tree.map(keep_rows, carry), x, block_key)
        return jax.tree.map(keep_rows, carry), y

      return apply if remat == "none" else jax.checkpoint(apply, policy=_REMAT_POLICIES[remat], prevent_cse=False)

    if last is None:
      return jax.lax.scan(body(step), carry, slices, length=self.depth)
    carry, ys = jax.lax.scan(body(step), carry, jax.tree.map(lambda a: a[:-1], slices), length=self.depth - 1)
    return body(last)(carry, jax.tree.map(lambda a: a[-1], slices))[0], ys


def parameter_count(shapes: Sequence[tuple[int, ...]]) -> int:
  return sum(math.prod(shape) for shape in shapes)
