"""LLaMA (Touvron et al. 2023), the language model: RMSNorm, rotary positions, SwiGLU, grouped queries, optional LoRA."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.config import LLMConfig, Remat
from lyrics_jax.models.layers import (Array, Embedding, Linear, LogicalAxes, RMSNorm, Stack, attend, merge_heads, split_heads,
                                      split_key)
from lyrics_jax.models.lora import LoRALinear


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
  """Keys and values of what was read so far: [L, B, S, K, d] each, S slots."""
  keys: Array
  values: Array


def rotary(x: Array, positions: Array, theta: float) -> Array:
  """Rotates halves (x_i, x_{i+d/2}) of [B, T, H, d] by angles positions * theta^(-2i/d); positions: int32[B, T]."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class LLaMABlock(nnx.Module):
  def __init__(self, config: LLMConfig, *, rngs: nnx.Rngs):
    self.config = config
    width, head_width = config.width, config.width // config.heads
    self.attention_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
    self.q = self._linear("q", width, width, ("embed", "heads"), rngs)
    self.k = self._linear("k", width, config.kv_heads * head_width, ("embed", "heads"), rngs)
    self.v = self._linear("v", width, config.kv_heads * head_width, ("embed", "heads"), rngs)
    self.o = self._linear("o", width, width, ("heads", "embed"), rngs)
    self.mlp_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
    self.gate = self._linear("gate", width, config.mlp_dim, ("embed", "mlp"), rngs)
    self.up = self._linear("up", width, config.mlp_dim, ("embed", "mlp"), rngs)
    self.down = self._linear("down", config.mlp_dim, width, ("mlp", "embed"), rngs)

  def _linear(self, name: str, n: int, m: int, axes: LogicalAxes, rngs: nnx.Rngs) -> Linear:
    if self.config.train == "lora" and name in self.config.lora.targets:
      return LoRALinear(n, m, axes, self.config.lora, rngs=rngs)
    return Linear(n, m, axes, bias=False, rngs=rngs)

  def __call__(self, x: Array, positions: Array, mask: Array, cache: tuple[Array, Array] | None, slot, key: Array | None):
    keys = split_key(key, 7)

    def apply(linear: Linear, x: Array, key: Array | None) -> Array:
      return linear(x, key) if isinstance(linear, LoRALinear) else linear(x)

    y = self.attention_norm(x)
    q = rotary(split_heads(apply(self.q, y, keys[0]), self.config.heads), positions, self.config.rope_theta)
    k = rotary(split_heads(apply(self.k, y, keys[1]), self.config.kv_heads), positions, self.config.rope_theta)
    v = split_heads(apply(self.v, y, keys[2]), self.config.kv_heads)
    if cache is not None:
      k, v = cache = tuple(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=1)
                           for old, new in zip(cache, (k, v)))
    x = x + apply(self.o, merge_heads(attend(q, k, v, mask)), keys[3])
    y = self.mlp_norm(x)
    y = jax.nn.silu(apply(self.gate, y, keys[4])) * apply(self.up, y, keys[5])
    return x + apply(self.down, y, keys[6]), cache


class LLaMA(nnx.Module):
  def __init__(self, config: LLMConfig, *, remat: Remat = "none", rngs: nnx.Rngs):
    self.config, self.remat = config, remat
    self.words = Embedding(config.vocab_size, config.width, rngs=rngs)
    self.stack = Stack(lambda rngs: LLaMABlock(config, rngs=rngs), config.layers, rngs=rngs)
    self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
    self.head = Linear(config.width, config.vocab_size, ("embed", "vocab"), bias=False, rngs=rngs)

  def __call__(self, embeddings: Array, positions: Array, mask: Array, *, cache: Cache | None = None, slot=0,
               key: Array | None = None) -> tuple[Array, Cache | None]:
    """Hidden states after the final norm, and the cache with these tokens added.

    Args:
      embeddings: [B, T, D]; positions: int32[B, T] for the rotary embedding.
      mask: bool[B, 1, T, T], or [B, 1, T, S] with a cache of S slots.
      slot: where in the cache these T tokens are written.
      key: for LoRA's dropout.
    """
    def step(block, x, layer_cache, key):
      return block(x, positions, mask, layer_cache, slot, key)

    caches = None if cache is None else (cache.keys, cache.values)
    x, caches = self.stack.scan(step, embeddings, caches, key=key, remat=self.remat)
    return self.norm(x), None if cache is None else Cache(*caches)

  def logits(self, hidden: Array) -> Array:
    """[..., D] -> float32[..., vocabulary]."""
    return self.head(hidden).astype(jnp.float32)

  def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    shape = (self.config.layers, batch, slots, self.config.kv_heads, self.config.width // self.config.heads)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
