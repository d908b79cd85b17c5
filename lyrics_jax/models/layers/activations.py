"""Activations by the names that configurations use."""

import jax

from lyrics_jax.models.layers.parameter import Array


def quick_gelu(x: Array) -> Array:
  """CLIP's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
  """The exact GELU, as BERT and EVA-CLIP have it."""
  return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"relu": jax.nn.relu, "gelu": gelu, "quick_gelu": quick_gelu}
