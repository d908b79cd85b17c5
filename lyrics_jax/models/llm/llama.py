"""LLaMA (Touvron et al.

2023), the language model: RMSNorm, rotary positions, SwiGLU, grouped queries, optional LoRA.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.models.layers.attention import attend_by_head
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.dropout import split_key
from lyrics_jax.models.layers.embedding import Embedding
from lyrics_jax.models.layers.kernels import causal_attention, causal_mask
from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.layers.lora import LoRALinear, LoRASettings
from lyrics_jax.models.layers.norms import RMSNorm
from lyrics_jax.models.layers.parameter import Array, LogicalAxes
from lyrics_jax.models.layers.remat import LINEAR, named
from lyrics_jax.models.layers.stack import Stack
from refiner_export.common.checks import at_least, heads_divide
from refiner_export.common.settings import Settings, require


@dataclasses.dataclass(unsafe_hash=True)
class LlamaSettings(Settings):
  """The default is the paper's language model, Vicuna-13B v1.1, with LoRA; `lora=None` is LLaMA without adapters."""
  vocab_size: int = 32000
  width: int = 5120
  layers: int = 40
  heads: int = 40
  kv_heads: int = 40
  mlp_dim: int = 13824
  rope_theta: float = 10000.0
  norm_eps: float = 1e-6
  max_positions: int = 2048
  lora: LoRASettings | None = dataclasses.field(default_factory=LoRASettings)

  @classmethod
  def vicuna_13b(cls) -> "LlamaSettings":
    """Vicuna-13B v1.1. Version 1.5 differs in norm_eps=1e-5 and max_positions=4096."""
    return cls()

  @classmethod
  def vicuna_7b(cls) -> "LlamaSettings":
    """Vicuna-7B v1.1. Version 1.5 differs in norm_eps=1e-5 and max_positions=4096."""
    return cls(width=4096, layers=32, heads=32, kv_heads=32, mlp_dim=11008)

  def check(self, path: str) -> None:
    at_least(self, path, 1, "vocab_size", "width", "layers", "heads", "kv_heads", "mlp_dim", "max_positions")
    heads_divide(path, self.width, self.heads)
    require(self.heads % self.kv_heads == 0,
            f"{path}.heads={self.heads} is not a multiple of {path}.kv_heads={self.kv_heads}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
  """Keys and values of what was read so far: [L, B, K, S, d] each, S slots."""
  keys: Array
  values: Array


def rotary(x: Array, positions: Array, theta: float) -> Array:
  """Rotates halves (x_i, x_{i+d/2}) of [B, H, T, d] by angles positions * theta^(-2i/d); positions: int32[B, T].

  The halves change places in a product with a permutation, which is exact. Slices of a TPU's lanes would have the
  compiler turn whole arrays around before and after.
  """
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
  cos = jnp.concatenate([jnp.cos(angles), jnp.cos(angles)], axis=-1)
  sin = jnp.concatenate([-jnp.sin(angles), jnp.sin(angles)], axis=-1)
  swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=0)
  swapped = jnp.matmul(x, swap, precision=jax.lax.Precision.HIGHEST)
  return named((x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype), LINEAR)


@jax.custom_vjp
def _gradient_once(x: Array) -> Array:
  """The identity. A barrier behind its gradient has the gradient computed once, and not inside each product."""
  return x


def _gradient_once_forward(x: Array):
  return x, None


def _gradient_once_backward(_, gradient: Array):
  return (jax.lax.optimization_barrier(gradient),)


_gradient_once.defvjp(_gradient_once_forward, _gradient_once_backward)


class LlamaBlock(nnx.Module):
  """One layer; with `int8` the matrices that are not adapters are quantised."""

  def __init__(self, settings: LlamaSettings, int8: bool, *, rngs: nnx.Rngs):
    self.settings, self.int8 = settings, int8
    width, mlp_dim, heads, kv_heads = settings.width, settings.mlp_dim, settings.heads, settings.kv_heads
    kv_width = kv_heads * (width // heads)
    self.attention_norm = RMSNorm(width, settings.norm_eps, rngs=rngs)
    self.q = self._linear("q", width, width, ("embed", "heads"), rngs, to_heads=heads)
    self.k = self._linear("k", width, kv_width, ("embed", "heads"), rngs, to_heads=kv_heads)
    self.v = self._linear("v", width, kv_width, ("embed", "heads"), rngs, to_heads=kv_heads)
    self.o = self._linear("o", width, width, ("heads", "embed"), rngs, from_heads=heads)
    self.mlp_norm = RMSNorm(width, settings.norm_eps, rngs=rngs)
    self.gate = self._linear("gate", width, mlp_dim, ("embed", "mlp"), rngs)
    self.up = self._linear("up", width, mlp_dim, ("embed", "mlp"), rngs)
    self.down = self._linear("down", mlp_dim, width, ("mlp", "embed"), rngs)

  def _linear(self, name: str, n: int, m: int, axes: LogicalAxes, rngs: nnx.Rngs, **heads: int) -> Linear:
    lora = self.settings.lora
    if lora is not None and name in lora.targets:
      return LoRALinear(n, m, axes, lora, rngs=rngs, int8=self.int8, **heads)
    return Linear(n, m, axes, bias=False, rngs=rngs, int8=self.int8, **heads)

  def __call__(self, x: Array, positions: Array, attention: Callable, cache: tuple[Array, Array] | None, slot,
               key: Array | None):
    theta, keys = self.settings.rope_theta, split_key(key, 7)
    y = self.attention_norm(x)
    q = rotary(self.q(y, keys[0]), positions, theta)
    k = rotary(self.k(y, keys[1]), positions, theta)
    v = self.v(y, keys[2])
    if cache is not None:
      k, v = cache = _extended(cache[0], k, slot), _extended(cache[1], v, slot)
    x = x + self.o(attention(q, k, v), keys[3])
    # Barriers have norm and gate, and the gradients of both factors of the gate, computed once. A TPU's compiler would
    # otherwise fuse them into the products and compute them again for each tile of a product.
    y = jax.lax.optimization_barrier(self.mlp_norm(x))
    gate, up = _gradient_once(self.gate(y, keys[4])), _gradient_once(self.up(y, keys[5]))
    y = jax.lax.optimization_barrier(jax.nn.silu(gate) * up)
    return x + self.down(y, keys[6]), cache


def _extended(cached: Array, new: Array, slot) -> Array:
  """The cache [B, K, S, d] with the keys or values of T new tokens, [B, K, T, d], from `slot` on."""
  return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), slot, axis=2)


class Llama(nnx.Module):
  """With `int8` the frozen kernels of the blocks are quantised; words and head, the most sensitive ones, are not."""

  def __init__(self, settings: LlamaSettings, compute: Compute = Compute(), *, int8: bool = False, rngs: nnx.Rngs):
    self.settings, self.remat, self.kernel = settings, compute.remat, compute.attention
    self.words = Embedding(settings.vocab_size, settings.width, rngs=rngs)
    self.stack = Stack(lambda rngs: LlamaBlock(settings, int8, rngs=rngs), settings.layers, rngs=rngs)
    self.norm = RMSNorm(settings.width, settings.norm_eps, rngs=rngs)
    self.head = Linear(settings.width, settings.vocab_size, ("embed", "vocab"), bias=False, rngs=rngs)

  def __call__(self, embeddings: Array, positions: Array, segments: Array, *, cache: Cache | None = None, slot=0,
               key: Array | None = None) -> tuple[Array, Cache | None]:
    """Hidden states after the final norm, and the cache with these tokens added.

    Args:
      embeddings: [B, T, D]; positions: int32[B, T] for the rotary embedding.
      segments: int32[B, T], the number of a token's conversation within its row, 0 on padding. With a cache it is
        int32[B, S], for what stands in the cache's S slots after this call. A token sees its own segment up to itself.
      slot: where in the cache these T tokens are written.
      key: for LoRA's dropout.
    """
    if cache is None:
      attention = causal_attention(segments, self.settings, self.kernel, embeddings.dtype)
    else:
      attention = functools.partial(attend_by_head, mask=causal_mask(segments, slot, embeddings.shape[1]))

    def step(block: LlamaBlock, x: Array, layer_cache, key: Array | None):
      return block(x, positions, attention, layer_cache, slot, key)

    caches = None if cache is None else (cache.keys, cache.values)
    x, caches = self.stack.scan(step, embeddings, caches, key=key, remat=self.remat)
    return self.norm(x), None if cache is None else Cache(*caches)

  def logits(self, hidden: Array) -> Array:
    """[..., D] -> float32[..., vocabulary]; the product is not rounded to a shorter dtype on the way."""
    return jnp.matmul(hidden, self.head.kernel[...].astype(hidden.dtype), preferred_element_type=jnp.float32)

  def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    settings = self.settings
    shape = (settings.layers, batch, settings.kv_heads, slots, settings.width // settings.heads)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
