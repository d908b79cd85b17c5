"""The refiner's detection rows and mask features as one sequence of tokens (paper section 3.1)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.layers.parameter import Array, normal, parameter, xavier_uniform
from refiner_export.common.checks import at_least
from refiner_export.common.settings import Settings

BOX = 4  # numbers of a box, which follow the feature in a row
_DETECTION, _MASK = 0, 1  # rows of the source embedding


@dataclasses.dataclass(unsafe_hash=True)
class LocalTokensSettings(Settings):
  """What of the refiner's output enters the model. Counts are upper bounds; the rest is padded and masked."""
  detection_rows: int = 900
  mask_rows: int = 64
  feature_width: int = 256

  @property
  def row_width(self) -> int:
    """A row is a feature and its box: 256 + 4 numbers."""
    return self.feature_width + BOX

  def check(self, path: str) -> None:
    at_least(self, path, 0, "detection_rows", "mask_rows")
    at_least(self, path, 1, "feature_width")


class LocalTokens(nnx.Module):
  """Each kind of row has its linear map (Xavier) and its source embedding."""

  def __init__(self, settings: LocalTokensSettings, width: int, *, rngs: nnx.Rngs):
    self.detection = Linear(settings.row_width, width, (None, "embed"), init=xavier_uniform, rngs=rngs)
    self.mask = Linear(settings.row_width, width, (None, "embed"), init=xavier_uniform, rngs=rngs)
    self.source = parameter(rngs, normal, (2, width), (None, "embed"))

  def __call__(self, detection: Array, masks: Array) -> Array:
    """[B, N, 260] and [B, M, 260] -> [B, N + M, D]; the last four columns are the box, cxcywh in [0, 1]."""
    source = self.source[...].astype(detection.dtype)
    return jnp.concatenate([self.detection(detection) + source[_DETECTION], self.mask(masks) + source[_MASK]], axis=1)
