"""Dropout, and the random keys for it. Evaluation has no key: then nothing is dropped."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lyrics_jax.models.layers.parameter import Array


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Inverted dropout; without a key the identity. The rate is met to 2^-17.

  One random word serves two numbers, and the words are drawn once, behind a barrier. Where a product takes the result,
  a TPU's compiler would otherwise draw them inside the product, as often as there are products, and drawing takes
  longer than the products of LoRA do.
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
