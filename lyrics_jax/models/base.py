"""What a stage asks of a model's settings, whichever model it is."""

import dataclasses
from collections.abc import Collection

from flax import nnx

from lyrics_jax.data.batch import Dimensions
from lyrics_jax.models.connectors.base import ConnectorSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.vision.vit import ViTSettings
from refiner_export.common.settings import Settings

PICTURE_FIELDS = ("image",)


@dataclasses.dataclass(unsafe_hash=True)
class ModelSettings(Settings):
  """Names a model and builds it. Every model sees pictures through an image encoder and a connector."""
  vision: ViTSettings = dataclasses.field(default_factory=ViTSettings)

  @property
  def connector_settings(self) -> ConnectorSettings:
    raise NotImplementedError

  @property
  def reads(self) -> tuple[str, ...]:
    """The fields of a batch that the model reads for whatever objective."""
    raise NotImplementedError

  @property
  def dimensions(self) -> dict[str, int]:
    """The sizes of a batch that the model decides, by their names in `data.batch.Dimensions`."""
    connector = self.connector_settings
    return {"image_size": self.vision.image_size, "tokens": connector.tokens(self.vision), **connector.dimensions}

  def check_lengths(self, lengths: Dimensions, path: str) -> None:
    """Raises `UserError` for texts that are longer than the model can read. `path` is the model's."""
    self.connector_settings.check_lengths(lengths, f"{path}.connector")

  def build(self, compute: Compute, int8: Collection[str], rngs: nnx.Rngs) -> nnx.Module:
    """The freshly initialised model.

    Args:
      int8: the parts, such as `vision` and `llm`, whose blocks are frozen and stored in int8.
    """
    raise NotImplementedError
