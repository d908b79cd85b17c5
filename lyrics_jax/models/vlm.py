"""A vision-language model: image encoder, connector and language model (stage 2, paper section 3.3).

What the connector makes of a picture are soft tokens, which stand at the picture's places among the words.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.data.batch import Dimensions
from lyrics_jax.models.base import PICTURE_FIELDS, ModelSettings
from lyrics_jax.models.connectors.base import ConnectorSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.inputs import Features, Pictures
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.kernels import segment_positions
from lyrics_jax.models.layers.parameter import Array
from lyrics_jax.models.llm.llama import Llama, LlamaSettings
from lyrics_jax.models.vision.vit import ViT
from refiner_export.common.settings import require

Batch = dict[str, Array]
CONVERSATION_FIELDS = ("ids", "segments", "slot")


@dataclasses.dataclass(unsafe_hash=True)
class VLMSettings(ModelSettings):
  """The default is the paper's stage 2; another connector makes it LLaVA or BLIP-2."""
  connector: ConnectorSettings = dataclasses.field(default_factory=QFormerSettings)
  llm: LlamaSettings = dataclasses.field(default_factory=LlamaSettings)

  @property
  def connector_settings(self) -> ConnectorSettings:
    return self.connector

  @property
  def reads(self) -> tuple[str, ...]:
    return PICTURE_FIELDS + self.connector.reads + CONVERSATION_FIELDS

  @property
  def dimensions(self) -> dict[str, int]:
    return super().dimensions | {"llm_vocabulary": self.llm.vocab_size}

  def check_lengths(self, lengths: Dimensions, path: str) -> None:
    super().check_lengths(lengths, path)
    require(lengths.soft_tokens < lengths.conversation <= self.llm.max_positions,
            f"config.data.llm_length={lengths.conversation} must exceed the {lengths.soft_tokens} soft tokens of a row "
            f"and be at most {path}.llm.max_positions={self.llm.max_positions}")

  def build(self, compute: Compute, int8: Collection[str], rngs: nnx.Rngs) -> "VLM":
    return VLM(self, compute, int8, rngs=rngs)


class VLM(nnx.Module):
  """Answers about pictures. Rows are conversations, each with up to I pictures, of which each has N soft tokens."""

  def __init__(self, settings: VLMSettings, compute: Compute = Compute(), int8: Collection[str] = (), *,
               rngs: nnx.Rngs):
    self.settings, self.dtype = settings, compute.activations
    self.vision = ViT(settings.vision, int8="vision" in int8, rngs=rngs)
    self.connector = settings.connector.build(settings.vision, settings.llm.width, compute, rngs)
    self.llm = Llama(settings.llm, compute, int8="llm" in int8, rngs=rngs)

  def see(self, pictures: Pictures) -> Features:
    """What the image encoder and the refiner have of pictures."""
    return Features.of(pictures, self.vision(pictures.image, self.dtype))

  def soft_tokens(self, batch: Batch, key: Array | None = None) -> Array:
    """float[B, I * N, D]: a row's pictures follow each other."""
    features = self.see(Pictures.of(batch))
    soft = self.connector(features, self.connector.text(batch), key)
    return soft.reshape(len(batch["image"]), -1, soft.shape[-1])

  def embed(self, batch: Batch, key: Array | None = None) -> Array:
    """The language model's input [B, L, D]: words, and where `slot` >= 0 the soft token of that number."""
    return self._embed(batch, self.soft_tokens(batch, key))

  def _embed(self, batch: Batch, soft: Array) -> Array:
    slot = batch["slot"][..., None]
    words = self.llm.words(batch["ids"]).astype(soft.dtype)
    return jnp.where(slot >= 0, jnp.take_along_axis(soft, jnp.maximum(slot, 0), axis=1), words)

  def __call__(self, batch: Batch, key: Array | None = None) -> Array:
    """Hidden states [B, L, D] behind the language model's final norm; `logits` makes words of them."""
    return self.passes(batch, key).hidden

  def logits(self, hidden: Array) -> Array:
    """[..., D] -> float32[..., vocabulary]."""
    return self.llm.logits(hidden)

  def passes(self, batch: Batch, key: Array | None = None) -> "ConversationPasses":
    connector_key, llm_key = (None, None) if key is None else jax.random.split(key)
    soft, segments = self.soft_tokens(batch, connector_key), batch["segments"]
    hidden, _ = self.llm(self._embed(batch, soft), segment_positions(segments), segments, key=llm_key)
    return ConversationPasses(self, batch, hidden, soft)


@dataclasses.dataclass
class ConversationPasses:
  """What the objectives of a vision-language model share on one batch.

  `hidden`: [B, L, D], of the language model; `soft`: [B, I * N, D], the soft tokens of all pictures.
  """
  model: VLM
  batch: Batch
  hidden: Array
  soft: Array

  def soft_token_spread(self) -> Array:
    """float32[]: how much soft tokens differ between pictures, over their size; near 0, all pictures look alike.

    It is the root mean square of what remains of a soft token without its mean over the batch's rows, divided by the
    root mean square of the tokens.
    """
    soft = jax.lax.stop_gradient(self.soft).astype(jnp.float32)
    rest = soft - soft.mean(0)
    return jnp.sqrt(jnp.square(rest).mean() / jnp.maximum(jnp.square(soft).mean(), 1e-12))
