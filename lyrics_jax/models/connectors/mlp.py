"""LLaVA's connectors: a linear map (LLaVA v1, Liu et al. 2023) or an MLP (LLaVA-1.5) over each image token."""

import dataclasses

import jax
from flax import nnx

from lyrics_jax.models.connectors.base import ConnectorSettings
from lyrics_jax.models.inputs import Features, Text
from lyrics_jax.models.layers.activations import gelu
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.layers.parameter import Array
from lyrics_jax.models.vision.vit import ViTSettings

# PyTorch initialises a linear map's kernel uniformly within 1 / sqrt(fan_in).
_torch_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(unsafe_hash=True)
class MLPSettings(ConnectorSettings):
  """Two linear maps with a GELU in between, from the image encoder's width to the language model's."""

  def tokens(self, vision: ViTSettings) -> int:
    return vision.tokens

  def build(self, vision: ViTSettings, width: int, compute: Compute, rngs: nnx.Rngs) -> "MLP":
    return MLP(vision.width, width, rngs=rngs)


class MLP(nnx.Module):
  """[P, T, D_image] -> [P, T, D_llm]."""

  def __init__(self, image_width: int, width: int, *, rngs: nnx.Rngs):
    self.linear_1 = Linear(image_width, width, (None, "embed"), init=_torch_uniform, rngs=rngs)
    self.linear_2 = Linear(width, width, ("embed", None), init=_torch_uniform, rngs=rngs)

  def __call__(self, features: Features, text: Text | None = None, key: Array | None = None) -> Array:
    return self.linear_2(gelu(self.linear_1(features.image)))

  def text(self, batch: dict[str, Array]) -> None:
    """The connector reads no text."""


@dataclasses.dataclass(unsafe_hash=True)
class LinearSettings(ConnectorSettings):
  """One linear map, from the image encoder's width to the language model's."""

  def tokens(self, vision: ViTSettings) -> int:
    return vision.tokens

  def build(self, vision: ViTSettings, width: int, compute: Compute, rngs: nnx.Rngs) -> "LinearConnector":
    return LinearConnector(vision.width, width, rngs=rngs)


class LinearConnector(nnx.Module):
  """[P, T, D_image] -> [P, T, D_llm]."""

  def __init__(self, image_width: int, width: int, *, rngs: nnx.Rngs):
    self.linear = Linear(image_width, width, (None, "embed"), init=_torch_uniform, rngs=rngs)

  def __call__(self, features: Features, text: Text | None = None, key: Array | None = None) -> Array:
    return self.linear(features.image)

  def text(self, batch: dict[str, Array]) -> None:
    """The connector reads no text."""
