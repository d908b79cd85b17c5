"""A stack of equal blocks: one block is compiled, and `scan` applies it as often as there are blocks."""

from collections.abc import Callable

import jax
from flax import nnx

from lyrics_jax.models.layers.compute import Remat
from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.layers.parameter import Array
from lyrics_jax.models.layers.remat import POLICIES
from lyrics_jax.sharding import heads_shards, keep_rows, splits_width


class Stack(nnx.Module):
  """`depth` equal blocks; every parameter has a leading axis of that length."""

  def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
    self.blocks = nnx.vmap(make_block, in_axes=0, out_axes=0)(rngs.fork(split=depth))
    self.depth = depth

  def scan(self, step: Callable, carry, xs=None, *, key: Array | None = None, remat: Remat = "none",
           last: Callable | None = None):
    """Applies `step(block, carry, x, key) -> (carry, y)` block after block.

    Args:
      xs: pytree whose leaves have a leading axis of length `depth`, one slice per block.
      key: random key, split into one per block.
      remat: what the backward pass recomputes: nothing ("none"), everything but linear maps and attention ("dots"),
        everything but attention ("attention"), or everything ("full").
      last: `step` of the last block, where it differs. The last block is then compiled separately, and its y is
        dropped.

    Returns:
      The last carry, and the stacked ys.
    """
    blocks = nnx.clone(self.blocks)
    _split_rows(blocks)
    graph, parameters = nnx.split(blocks)
    keys = None if key is None else jax.random.split(key, self.depth)
    slices = parameters, xs, keys

    def body(step: Callable) -> Callable:
      def apply(carry, slices):
        block_parameters, x, block_key = slices
        carry, y = step(nnx.merge(graph, block_parameters), jax.tree.map(keep_rows, carry), x, block_key)
        return jax.tree.map(keep_rows, carry), y

      return apply if remat == "none" else jax.checkpoint(apply, policy=POLICIES[remat], prevent_cse=False)

    if last is None:
      return jax.lax.scan(body(step), carry, slices, length=self.depth)
    before = jax.tree.map(lambda a: a[:-1], slices)
    carry, ys = jax.lax.scan(body(step), carry, before, length=self.depth - 1)
    return body(last)(carry, jax.tree.map(lambda a: a[-1], slices))[0], ys


def _split_rows(blocks: nnx.Module) -> None:
  """Gives the stacked kernels [L, H*d, k] whose rows are heads the shape [L, H, d, k].

  A TPU's compiler reads a layer out of the stack within its product, but not where something stands in between. Rows
  that are split inside the loop are copied first, which takes as long as the products when there are few tokens. Where
  the mesh splits the other axis, each layer is gathered before its product; there a layer split into heads would be
  gathered in an order that has to be turned around, so it stays whole.
  """
  if splits_width():
    return
  for _, module in nnx.iter_modules(blocks):
    heads = isinstance(module, Linear) and (module.to_heads or module.from_heads)
    if heads and heads % heads_shards() == 0:  # otherwise a device has parts of heads
      kernel = module.kernel
      kernel.set_value(kernel[...].reshape(len(kernel), heads, -1, kernel.shape[-1]))
