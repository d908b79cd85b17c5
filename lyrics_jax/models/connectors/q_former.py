"""The Querying Transformer as a connector: Lyrics' MQ-Former, or BLIP-2's Q-Former without grounding queries."""

import dataclasses

from flax import nnx

from lyrics_jax.data.batch import Dimensions
from lyrics_jax.models import visibility
from lyrics_jax.models.connectors.base import ConnectorSettings
from lyrics_jax.models.connectors.key_values import PictureKeyValues
from lyrics_jax.models.connectors.local_tokens import LocalTokens, LocalTokensSettings
from lyrics_jax.models.connectors.mq_former import MQFormer, MQFormerSettings
from lyrics_jax.models.inputs import Features, Text, TokenIds, merge_pictures, spatial_and_caption
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.layers.norms import LayerNorm
from lyrics_jax.models.layers.parameter import Array
from lyrics_jax.models.vision.vit import ViTSettings
from refiner_export.common.settings import require

LOCAL_FIELDS = ("detection", "detection_mask", "masks", "masks_mask")


@dataclasses.dataclass(unsafe_hash=True)
class QFormerSettings(ConnectorSettings):
  """Queries look at the picture, and at the texts that the configuration lets in; they become the soft tokens.

  Attributes:
    former: the transformer.
    local: the refiner's rows, which the grounding queries look at.
    spatial, instruction: whether the queries also see the spatial representation, and the instruction (the paper's
      semantic-aware feature extraction). Stage 1 has objectives instead, which say who sees whom.
  """
  former: MQFormerSettings = dataclasses.field(default_factory=MQFormerSettings)
  local: LocalTokensSettings = dataclasses.field(default_factory=LocalTokensSettings)
  spatial: bool = True
  instruction: bool = True

  @property
  def local_reads(self) -> tuple[str, ...]:
    """The fields of a batch that the grounding queries look at."""
    return LOCAL_FIELDS if self.former.grounding_queries else ()

  @property
  def reads(self) -> tuple[str, ...]:
    fields = self.local_reads
    if self.spatial:
      fields += ("spatial_ids", "spatial_mask")
    if self.instruction:
      fields += ("instruction_ids", "instruction_mask")
    return fields

  def tokens(self, vision: ViTSettings) -> int:
    return self.former.queries

  @property
  def dimensions(self) -> dict[str, int]:
    return {"detection_rows": self.local.detection_rows, "mask_rows": self.local.mask_rows,
            "local_width": self.local.row_width, "former_vocabulary": self.former.vocab_size}

  def check_lengths(self, lengths: Dimensions, path: str) -> None:
    spatial, caption, former = lengths.spatial, lengths.caption, self.former
    longest = max(spatial, caption) if former.restart_positions else spatial + caption
    require(longest <= former.max_positions,
            f"config.data.spatial_length={spatial} and caption_length={caption} need {longest} positions, "
            f"{path}.former.max_positions={former.max_positions}")

  def build(self, vision: ViTSettings, width: int, compute: Compute, rngs: nnx.Rngs) -> "QFormerConnector":
    return QFormerConnector(self, vision, width, compute, rngs=rngs)


class QFormer(nnx.Module):
  """The MQ-Former with what stands between it and the frozen features: the image tokens' norm, and the local tokens."""

  def __init__(self, settings: QFormerSettings, vision: ViTSettings, compute: Compute, *, rngs: nnx.Rngs):
    self.settings = settings
    self.image_norm = LayerNorm(vision.width, vision.norm_eps, rngs=rngs)
    if settings.former.grounding_queries:
      self.local_tokens = LocalTokens(settings.local, settings.former.width, rngs=rngs)
    self.former = MQFormer(settings.former, vision.width, compute, rngs=rngs)

  def key_values(self, features: Features) -> PictureKeyValues:
    """The cross-attention keys and values of P pictures."""
    image = self.image_norm(features.image)
    if not self.settings.former.grounding_queries:
      return self.former.key_values(image)
    return self.former.key_values(image, self.local_tokens(features.detection, features.masks), features.valid)

  def join(self, spatial: TokenIds | None, caption: TokenIds | None) -> Text:
    """`[BOS]` spatial representation, then `[CLS]` caption or instruction; either may be absent."""
    return spatial_and_caption(spatial, caption, self.settings.former.restart_positions)


class QFormerConnector(QFormer):
  """Query outputs, projected to the language model's width."""

  def __init__(self, settings: QFormerSettings, vision: ViTSettings, width: int, compute: Compute, *, rngs: nnx.Rngs):
    super().__init__(settings, vision, compute, rngs=rngs)
    self.projection = Linear(settings.former.width, width, (None, "embed"), rngs=rngs)

  def __call__(self, features: Features, text: Text | None = None, key: Array | None = None) -> Array:
    """float[P, Q, D_llm]."""
    return self.projection(self.query_outputs(features, text, key))

  def query_outputs(self, features: Features, text: Text | None = None, key: Array | None = None) -> Array:
    """Hidden states of the queries, [P, Q, D]. With a text, queries and text see each other."""
    pictures = self.key_values(features)
    if text is None:
      return self.former.query_pass(pictures, key)[0]
    return self.former.joint_pass(pictures, text, visibility.INSTRUCT, key, read=())[0]

  def text(self, batch: dict[str, Array]) -> Text | None:
    spatial = instruction = None
    if self.settings.spatial:
      spatial = merge_pictures(batch["spatial_ids"]), merge_pictures(batch["spatial_mask"])
    if self.settings.instruction:
      instruction = merge_pictures(batch["instruction_ids"]), merge_pictures(batch["instruction_mask"])
    return None if spatial is None and instruction is None else self.join(spatial, instruction)
