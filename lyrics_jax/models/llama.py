"""LLaMA (Touvron et al. 2023), the language model: RMSNorm, rotary positions, SwiGLU, grouped queries, optional LoRA."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lyrics_jax.config import Attention, LLMConfig, Remat
from lyrics_jax.models.attention import causal_attention, causal_mask
from lyrics_jax.models.layers import LINEAR, Array, Embedding, Linear, LogicalAxes, RMSNorm, Stack, attend_by_head, split_key
from lyrics_jax.models.lora import LoRALinear


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
  """Keys and values of what was read so far: [L, B, K, S, d] each, S slots."""
  keys: Array
  values: Array


def rotary(x: Array, positions: Array, theta: float) -> Array:
  """Rotates halves (x_i, x_{i+d/2}) of [B, H, T, d] by angles positions * theta^(-2i/d); positions: int32[B, T].

  Halves change places in a product with a permutation, which is exact: slices of a TPU's lanes would have the compiler turn
  whole arrays around before and after.
  """
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
  cos, sin = (jnp.concatenate(halves, axis=-1) for halves in (
      (jnp.cos(angles), jnp.cos(angles)), (-jnp.sin(angles), jnp.sin(angles))))
  swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=0)
  swapped = jnp.matmul(x, swap, precision=jax.lax.Precision.HIGHEST)
  return checkpoint_name((x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype), LINEAR)


@jax.custom_vjp
def _gradient_once(x: Array) -> Array:
  """The identity, whose gradient stands behind a barrier, so that it is computed once and not inside each product."""
  return x


_gradient_once.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


class LLaMABlock(nnx.Module):
  def __init__(self, config: LLMConfig, int8: bool, *, rngs: nnx.Rngs):
    self.config, self.int8 = config, int8 and config.train != "full"
    width, head_width = config.width, config.width // config.heads
    self.attention_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
    self.q = self._linear("q", width, width, ("embed", "heads"), rngs, to_heads=config.heads)
    self.k = self._linear("k", width, config.kv_heads * head_width, ("embed", "heads"), rngs, to_heads=config.kv_heads)
    self.v = self._linear("v", width, config.kv_heads * head_width, ("embed", "heads"), rngs, to_heads=config.kv_heads)
    self.o = self._linear("o", width, width, ("heads", "embed"), rngs, from_heads=config.heads)
    self.mlp_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
    self.gate = self._linear("gate", width, config.mlp_dim, ("embed", "mlp"), rngs)
    self.up = self._linear("up", width, config.mlp_dim, ("embed", "mlp"), rngs)
    self.down = self._linear("down", config.mlp_dim, width, ("mlp", "embed"), rngs)

  def _linear(self, name: str, n: int, m: int, axes: LogicalAxes, rngs: nnx.Rngs, **heads: int) -> Linear:
    if self.config.train == "lora" and name in self.config.lora.targets:
      return LoRALinear(n, m, axes, self.config.lora, rngs=rngs, int8=self.int8, **heads)
    return Linear(n, m, axes, bias=False, rngs=rngs, int8=self.int8, **heads)

  def __call__(self, x: Array, positions: Array, attention: Callable, cache: tuple[Array, Array] | None, slot,
               key: Array | None):
    config, keys = self.config, split_key(key, 7)
    y = self.attention_norm(x)
    q = rotary(self.q(y, keys[0]), positions, config.rope_theta)
    k = rotary(self.k(y, keys[1]), positions, config.rope_theta)
    v = self.v(y, keys[2])
    if cache is not None:
      k, v = cache = tuple(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=2)
                           for old, new in zip(cache, (k, v)))
    x = x + self.o(attention(q, k, v), keys[3])
    # Behind barriers norm and gate, and the gradients of both its factors, are computed once. A TPU's compiler would fuse them
    # into the products and compute them again for each of their tiles.
    y = jax.lax.optimization_barrier(self.mlp_norm(x))
    gate, up = _gradient_once(self.gate(y, keys[4])), _gradient_once(self.up(y, keys[5]))
    y = jax.lax.optimization_barrier(jax.nn.silu(gate) * up)
    return x + self.down(y, keys[6]), cache


class LLaMA(nnx.Module):
  """With `int8` the frozen kernels of the blocks are quantised; words and head, the most sensitive ones, are not."""

  def __init__(self, config: LLMConfig, *, remat: Remat = "none", attention: Attention = "auto", int8: bool = False,
               rngs: nnx.Rngs):
    self.config, self.remat, self.attention = config, remat, attention
    self.words = Embedding(config.vocab_size, config.width, rngs=rngs)
    self.stack = Stack(lambda rngs: LLaMABlock(config, int8, rngs=rngs), config.layers, rngs=rngs)
    self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
    self.head = Linear(config.width, config.vocab_size, ("embed", "vocab"), bias=False, rngs=rngs)

  def __call__(self, embeddings: Array, positions: Array, segments: Array, *, cache: Cache | None = None, slot=0,
               key: Array | None = None) -> tuple[Array, Cache | None]:
    """Hidden states after the final norm, and the cache with these tokens added.

    Args:
      embeddings: [B, T, D]; positions: int32[B, T] for the rotary embedding.
      segments: int32[B, T], which conversation of its row a token is of, 0 on padding; with a cache int32[B, S], of
        what stands in its S slots after this call. A token sees its own segment up to itself.
      slot: where in the cache these T tokens are written.
      key: for LoRA's dropout.
    """
    if cache is None:
      attention = causal_attention(segments, self.config, self.attention, embeddings.dtype)
    else:
      attention = functools.partial(attend_by_head, mask=causal_mask(segments, slot, embeddings.shape[1]))

    def step(block, x, layer_cache, key):
      return block(x, positions, attention, layer_cache, slot, key)

    caches = None if cache is None else (cache.keys, cache.values)
    x, caches = self.stack.scan(step, embeddings, caches, key=key, remat=self.remat)
    return self.norm(x), None if cache is None else Cache(*caches)

  def logits(self, hidden: Array) -> Array:
    """[..., D] -> float32[..., vocabulary], not rounded to a shorter dtype on the way."""
    return jnp.matmul(hidden, self.head.kernel[...].astype(hidden.dtype), preferred_element_type=jnp.float32)

  def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    shape = (self.config.layers, batch, self.config.kv_heads, slots, self.config.width // self.config.heads)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
