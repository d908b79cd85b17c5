"""Word and position embeddings, and a language model's tied output map."""

import jax.numpy as jnp
from flax import nnx

from lyrics_jax.models.layers.parameter import Array, LogicalAxes, normal, parameter


class Embedding(nnx.Module):
  """ids: int32[...] -> float32[..., D]; `logits` is the tied output map."""

  def __init__(self, rows: int, width: int, axes: LogicalAxes = ("vocab", "embed"), *, rngs: nnx.Rngs):
    self.embedding = parameter(rngs, normal, (rows, width), axes)

  def __call__(self, ids: Array) -> Array:
    return jnp.take(self.embedding[...], ids, axis=0)

  def logits(self, x: Array) -> Array:
    """x: [..., D] -> float32[..., rows]."""
    return jnp.einsum("...d,vd->...v", x, self.embedding[...].astype(x.dtype), preferred_element_type=jnp.float32)
