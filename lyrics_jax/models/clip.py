"""The frozen image encoder: CLIP's vision transformer (Radford et al. 2021) or BLIP-2's ViT-g (EVA-CLIP, Fang et al. 2022)."""

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.config import VisionConfig
from lyrics_jax.models.layers import Array, LayerNorm, Linear, Stack, attend, merge_heads, normal, parameter, split_heads

# Mean and standard deviation of CLIP's training pictures, RGB in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def quick_gelu(x: Array) -> Array:
  return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
  return jax.nn.gelu(x, approximate=False)


class CLIPBlock(nnx.Module):
  """Pre-norm transformer block; with `int8` its kernels are quantised."""

  def __init__(self, config: VisionConfig, int8: bool, *, rngs: nnx.Rngs):
    width, self.heads = config.width, config.heads
    self.attention_norm = LayerNorm(width, config.norm_eps, rngs=rngs)
    self.q = Linear(width, width, ("embed", "heads"), int8=int8, rngs=rngs)
    self.k = Linear(width, width, ("embed", "heads"), int8=int8, rngs=rngs)
    self.v = Linear(width, width, ("embed", "heads"), int8=int8, rngs=rngs)
    self.o = Linear(width, width, ("heads", "embed"), int8=int8, rngs=rngs)
    self.mlp_norm = LayerNorm(width, config.norm_eps, rngs=rngs)
    self.up = Linear(width, config.mlp_dim, ("embed", "mlp"), int8=int8, rngs=rngs)
    self.down = Linear(config.mlp_dim, width, ("mlp", "embed"), int8=int8, rngs=rngs)
    self.activation = quick_gelu if config.kind == "clip" else gelu

  def __call__(self, x: Array) -> Array:
    y = self.attention_norm(x)
    q, k, v = (split_heads(project(y), self.heads) for project in (self.q, self.k, self.v))
    x = x + self.o(merge_heads(attend(q, k, v, None)))
    return x + self.down(self.activation(self.up(self.mlp_norm(x))))


class CLIPVision(nnx.Module):
  """uint8[B, S, S, 3] pictures -> [B, 1 + (S/p)^2, D] tokens of the last block, class token first, before the final norm."""

  def __init__(self, config: VisionConfig, *, int8: bool = False, rngs: nnx.Rngs):
    self.config = config
    patch = config.patch_size
    self.patch = Linear(patch * patch * 3, config.width, (None, "embed"), bias=config.kind == "eva", rngs=rngs)
    self.class_token = parameter(rngs, normal, (config.width,), (None,))
    self.positions = parameter(rngs, normal, (config.tokens, config.width), (None, "embed"))
    self.input_norm = LayerNorm(config.width, config.norm_eps, rngs=rngs) if config.kind == "clip" else None
    self.stack = Stack(lambda rngs: CLIPBlock(config, int8, rngs=rngs), config.layers, rngs=rngs)

  def __call__(self, images: Array, dtype: jnp.dtype) -> Array:
    batch, size, _, _ = images.shape
    patch, grid = self.config.patch_size, size // self.config.patch_size
    pixels = (images.astype(jnp.float32) / 255 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
    patches = pixels.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, -1)
    tokens = self.patch(patches.astype(dtype))
    class_token = jnp.broadcast_to(self.class_token[...].astype(dtype), (batch, 1, self.config.width))
    x = jnp.concatenate([class_token, tokens], axis=1) + self.positions[...].astype(dtype)
    x = x if self.input_norm is None else self.input_norm(x)
    return self.stack.scan(lambda block, x, _, __: (block(x), None), x)[0]
