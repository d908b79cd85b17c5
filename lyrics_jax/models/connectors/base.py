"""What every connector offers, and what its settings say."""

import dataclasses
from typing import Protocol

from flax import nnx

from lyrics_jax.data.batch import Dimensions
from lyrics_jax.models.inputs import Features, Text
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.parameter import Array
from lyrics_jax.models.vision.vit import ViTSettings
from refiner_export.common.settings import Settings


class Connector(Protocol):
  """A module that turns what is seen of P pictures into soft tokens."""

  def __call__(self, features: Features, text: Text | None, key: Array | None) -> Array:
    """float[P, tokens, width of the language model]; `text` is what the connector reads beside each picture."""

  def text(self, batch: dict[str, Array]) -> Text | None:
    """The text of P pictures out of a batch's fields; None where the connector reads none."""


@dataclasses.dataclass(unsafe_hash=True)
class ConnectorSettings(Settings):
  """Names a connector and builds it."""

  @property
  def reads(self) -> tuple[str, ...]:
    """The fields of a batch that the connector reads besides the pictures."""
    return ()

  def tokens(self, vision: ViTSettings) -> int:
    """How many soft tokens stand for one picture: the only home of that number."""
    raise NotImplementedError

  @property
  def dimensions(self) -> dict[str, int]:
    """The sizes of the fields that the connector reads, by their names in `data.batch.Dimensions`."""
    return {}

  def check_lengths(self, lengths: Dimensions, path: str) -> None:
    """Raises `UserError` for texts that are longer than the connector can read. `path` is the connector's."""

  def build(self, vision: ViTSettings, width: int, compute: Compute, rngs: nnx.Rngs) -> Connector:
    """The freshly initialised connector; `width` is that of the language model."""
    raise NotImplementedError
