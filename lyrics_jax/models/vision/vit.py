"""The vision transformer: CLIP's (Radford et al. 2021), or BLIP-2's ViT-g (EVA-CLIP, Fang et al. 2022)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from lyrics_jax.models.layers.activations import ACTIVATIONS
from lyrics_jax.models.layers.attention import attend
from lyrics_jax.models.layers.linear import Linear, merge_heads, split_heads
from lyrics_jax.models.layers.norms import LayerNorm
from lyrics_jax.models.layers.parameter import Array, normal, parameter
from lyrics_jax.models.layers.stack import Stack
from refiner_export.common.checks import at_least, heads_divide
from refiner_export.common.settings import Settings, require

# Mean and standard deviation of CLIP's training pictures, RGB in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(unsafe_hash=True)
class ViTSettings(Settings):
  """An image encoder; the default is the paper's, CLIP ViT-L/14 at 224 pixels.

  Attributes:
    image_size, patch_size: sides in pixels.
    layers: how many blocks run. A file of weights may have more: the later ones are left out.
    input_norm: whether a norm stands before the first block; CLIP has one, EVA-CLIP has none.
    patch_bias: whether the patches' linear map has a bias; EVA-CLIP's has one.
    class_token: whether the class token is one of the tokens that the encoder gives. LLaVA drops it.
  """
  image_size: int = 224
  patch_size: int = 14
  width: int = 1024
  layers: int = 24
  heads: int = 16
  mlp_dim: int = 4096
  norm_eps: float = 1e-5
  input_norm: bool = True
  patch_bias: bool = False
  activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
  class_token: Literal["keep", "drop"] = "keep"

  @classmethod
  def clip_vit_l_14(cls, image_size: int = 224) -> "ViTSettings":
    """CLIP ViT-L/14, published at 224 and 336 pixels."""
    return cls(image_size=image_size)

  @classmethod
  def eva_vit_g_14(cls) -> "ViTSettings":
    """BLIP-2's ViT-g/14: EVA-CLIP without its last block."""
    return cls(width=1408, layers=39, mlp_dim=6144, norm_eps=1e-6, input_norm=False, patch_bias=True, activation="gelu")

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def tokens(self) -> int:
    """How many tokens the encoder gives for a picture."""
    return self.patches + (self.class_token == "keep")

  def check(self, path: str) -> None:
    at_least(self, path, 1, "image_size", "patch_size", "width", "layers", "heads", "mlp_dim")
    require(self.image_size % self.patch_size == 0,
            f"{path}.image_size={self.image_size} is not a multiple of {path}.patch_size={self.patch_size}")
    heads_divide(path, self.width, self.heads)


class ViTBlock(nnx.Module):
  """Pre-norm transformer block; with `int8` its kernels are quantised."""

  def __init__(self, settings: ViTSettings, int8: bool, *, rngs: nnx.Rngs):
    width, self.heads = settings.width, settings.heads
    self.attention_norm = LayerNorm(width, settings.norm_eps, rngs=rngs)
    self.q = Linear(width, width, ("embed", "heads"), int8=int8, rngs=rngs)
    self.k = Linear(width, width, ("embed", "heads"), int8=int8, rngs=rngs)
    self.v = Linear(width, width, ("embed", "heads"), int8=int8, rngs=rngs)
    self.o = Linear(width, width, ("heads", "embed"), int8=int8, rngs=rngs)
    self.mlp_norm = LayerNorm(width, settings.norm_eps, rngs=rngs)
    self.up = Linear(width, settings.mlp_dim, ("embed", "mlp"), int8=int8, rngs=rngs)
    self.down = Linear(settings.mlp_dim, width, ("mlp", "embed"), int8=int8, rngs=rngs)
    self.activation = settings.activation

  def __call__(self, x: Array) -> Array:
    y = self.attention_norm(x)
    q, k, v = (split_heads(linear(y), self.heads) for linear in (self.q, self.k, self.v))
    x = x + self.o(merge_heads(attend(q, k, v, None)))
    return x + self.down(ACTIVATIONS[self.activation](self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
  """uint8[B, S, S, 3] pictures -> [B, tokens, D] of the last block, before any final norm; class token first."""

  def __init__(self, settings: ViTSettings, *, int8: bool = False, rngs: nnx.Rngs):
    self.settings = settings
    patch, width = settings.patch_size, settings.width
    self.patch = Linear(patch * patch * 3, width, (None, "embed"), bias=settings.patch_bias, rngs=rngs)
    self.class_token = parameter(rngs, normal, (width,), (None,))
    self.positions = parameter(rngs, normal, (settings.patches + 1, width), (None, "embed"))
    self.input_norm = LayerNorm(width, settings.norm_eps, rngs=rngs) if settings.input_norm else None
    self.stack = Stack(lambda rngs: ViTBlock(settings, int8, rngs=rngs), settings.layers, rngs=rngs)

  def __call__(self, images: Array, dtype: jnp.dtype) -> Array:
    batch = len(images)
    tokens = self.patch(self._patches(images).astype(dtype))
    class_token = jnp.broadcast_to(self.class_token[...].astype(dtype), (batch, 1, self.settings.width))
    x = jnp.concatenate([class_token, tokens], axis=1) + self.positions[...].astype(dtype)
    x = x if self.input_norm is None else self.input_norm(x)
    x, _ = self.stack.scan(_step, x)
    return x[:, 1:] if self.settings.class_token == "drop" else x

  def _patches(self, images: Array) -> Array:
    """float32[B, (S/p)^2, p * p * 3]: the normalised pixels of each patch, patches in raster order."""
    batch, patch, grid = len(images), self.settings.patch_size, images.shape[1] // self.settings.patch_size
    pixels = (images.astype(jnp.float32) / 255 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
    squares = pixels.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(batch, grid * grid, -1)


def _step(block: ViTBlock, x: Array, _, __):
  return block(x), None
