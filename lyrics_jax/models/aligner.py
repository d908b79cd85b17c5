"""The model of stage 1: pictures, objects and texts are aligned (paper section 3.2).

The image encoder and the Querying Transformer are those of `vlm.py`; heads for contrast (ITC), matching (ITM), captions
(ICG) and masked spatial prediction (MSP) stand on it. V are visual queries, G grounding queries, S the spatial
representation, C the caption. The losses are in `objectives/`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Collection
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.models.base import PICTURE_FIELDS, ModelSettings
from lyrics_jax.models import visibility
from lyrics_jax.models.connectors.key_values import KeyValue, PictureKeyValues
from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.connectors.q_former import QFormer, QFormerSettings
from lyrics_jax.models.inputs import Features, Pictures, Text, TokenIds, merge_pictures
from lyrics_jax.models.layers.activations import gelu
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.embedding import Embedding
from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.layers.norms import LayerNorm
from lyrics_jax.models.layers.parameter import Array, parameter, zeros
from lyrics_jax.models.vision.vit import ViT
from refiner_export.common.checks import at_least
from refiner_export.common.settings import require

Batch = dict[str, Array]


@dataclasses.dataclass(unsafe_hash=True)
class AlignerSettings(ModelSettings):
  """Attributes:
    temperature: of the contrastive similarity at the start; it is learnt.
    temperature_bounds: the temperature stays between them; these are ALBEF's and BLIP's.
    itc_pooling: "mean", a picture is its pooled queries (the paper); "max", its most similar query (BLIP-2).
    itc_width: of the features by which pictures and texts are compared.
  """
  connector: QFormerSettings = dataclasses.field(default_factory=QFormerSettings)
  temperature: float = 0.07
  temperature_bounds: tuple[float, float] = (0.001, 0.5)
  itc_pooling: Literal["mean", "max"] = "mean"
  itc_width: int = 256

  @property
  def connector_settings(self) -> QFormerSettings:
    return self.connector

  @property
  def reads(self) -> tuple[str, ...]:
    return PICTURE_FIELDS + self.connector.local_reads

  def build(self, compute: Compute, int8: Collection[str], rngs: nnx.Rngs) -> "Aligner":
    return Aligner(self, compute, int8, rngs=rngs)

  def check(self, path: str) -> None:
    low, high = self.temperature_bounds
    require(0 < low <= self.temperature <= high, f"{path}.temperature={self.temperature} must lie between "
                                                 f"{path}.temperature_bounds={low, high}, which are positive")
    at_least(self, path, 1, "itc_width")
    former = self.connector.former
    require(former.grounding_queries > 0,
            f"{path}.connector.former.grounding_queries=0: the heads of ITC and ITM read grounding queries; set at "
            "least 1, and to train without a refiner set config.data.use_refiner=false")


class LMHead(nnx.Module):
  """BERT's prediction head: dense, activation, norm, then the tied word embedding and a bias."""

  def __init__(self, settings: MQFormerSettings, *, rngs: nnx.Rngs):
    self.dense = Linear(settings.width, settings.width, ("embed", None), rngs=rngs)
    self.norm = LayerNorm(settings.width, settings.norm_eps, rngs=rngs)
    self.bias = parameter(rngs, zeros, (settings.vocab_size,), ("vocab",))

  def __call__(self, hidden: Array, words: Embedding) -> Array:
    """[..., D] and the MQ-Former's word embedding -> float32[..., vocabulary]."""
    return words.logits(self.norm(gelu(self.dense(hidden)))) + self.bias[...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class AlignmentOutput:
  """What the model makes of B pairs, without dropout.

  `image_features`: float32[B, N, W] and `text_features`: float32[B, W], of length 1. `similarity`: float32[B, B], row
  the picture, column the text. `itm`: [2, B, 2], (no match, match) by the visual and by the grounding queries of pair
  i. `icg`: float32[B, Tc, vocabulary]; `msp`: float32[B, Ts, vocabulary].
  """
  image_features: Array
  text_features: Array
  similarity: Array
  itm: Array
  icg: Array
  msp: Array


class Aligner(nnx.Module):
  """Image encoder, Querying Transformer and the heads of stage 1."""

  def __init__(self, settings: AlignerSettings, compute: Compute = Compute(), int8: Collection[str] = (), *,
               rngs: nnx.Rngs):
    width, itc_width = settings.connector.former.width, settings.itc_width
    self.settings, self.dtype = settings, compute.activations
    self.vision = ViT(settings.vision, int8="vision" in int8, rngs=rngs)
    self.connector = QFormer(settings.connector, settings.vision, compute, rngs=rngs)
    self.itc_image = Linear(2 * width, itc_width, ("embed", None), rngs=rngs)
    self.itc_text = Linear(2 * width, itc_width, ("embed", None), rngs=rngs)
    self.temperature = parameter(rngs, jax.nn.initializers.constant(settings.temperature), (), (),
                                 bounds=settings.temperature_bounds)
    self.itm = Linear(width, 2, ("embed", None), rngs=rngs)
    self.lm_head = LMHead(settings.connector.former, rngs=rngs)

  def see(self, pictures: Pictures) -> Features:
    """What the frozen parts make of pictures: nothing that stage 1 trains has touched it."""
    return Features.of(pictures, self.vision(pictures.image, self.dtype))

  def key_values(self, features: Features) -> PictureKeyValues:
    """The cross-attention keys and values of pictures, computed once for all passes."""
    return self.connector.key_values(features)

  def encode_queries(self, pictures: PictureKeyValues, key: Array | None = None) -> tuple[Array, KeyValue]:
    """Hidden states of the queries, [P, Q, D], and the context that caption and spatial texts are read against.

    In ITC, ICG and MSP queries attend to no text, so one pass of the queries serves all three.
    """
    return self.connector.former.query_pass(pictures, key)

  def encode_images(self, queries: Array) -> Array:
    """Hidden states [P, Q, D] -> L2-normalised float32[P, N, W]: the N features that a picture is compared by.

    "mean" pooling (the paper) gives one, the linear map of H_I = [mean(V); mean(G)]. "max" (BLIP-2 and the authors'
    code) gives one of each query: the same map of [v; 0] for a visual and of [0; g] for a grounding query.
    """
    if self.settings.itc_pooling == "mean":
      pooled = jnp.concatenate(self.connector.former.pool(queries), axis=-1)
      return _normalised(self.itc_image(pooled))[:, None]
    visual, width = self.settings.connector.former.visual_queries, queries.shape[-1]
    first_half = jnp.pad(queries[:, :visual], ((0, 0), (0, 0), (0, width)))
    second_half = jnp.pad(queries[:, visual:], ((0, 0), (0, 0), (width, 0)))
    return _normalised(self.itc_image(jnp.concatenate([first_half, second_half], axis=1)))

  def encode_texts(self, text: Text, key: Array | None = None) -> Array:
    """H_T = [h(BOS); h(CLS)] -> L2-normalised float32[B, W]; text sees no queries."""
    ends = text.segments.index(visibility.S), text.segments.index(visibility.C)
    hidden = self.connector.former.text_pass(text, visibility.ITC, None, key, read=ends)
    return _normalised(self.itc_text(hidden.reshape(len(hidden), -1)))

  def similarity(self, images: Array, texts: Array) -> Array:
    """float32[P, B] from features [P, N, W] and [B, W], divided by the learnt temperature.

    A picture's similarity to a text is that of the most similar of the picture's features.
    """
    return jnp.einsum("ind,jd->inj", images, texts).max(1) / self.temperature[...]

  def match(self, pictures: PictureKeyValues, text: Text, key: Array | None = None) -> Array:
    """Logits [2, pairs, 2] of (no match, match): by mean(V), which saw the caption, and by mean(G), which saw S."""
    queries, _ = self.connector.former.joint_pass(pictures, text, visibility.ITM, key, read=())
    return jnp.stack([self.itm(pooled) for pooled in self.connector.former.pool(queries)])

  def caption_logits(self, context: KeyValue, caption: TokenIds, key: Array | None = None) -> Array:
    """float32[B, Tc, vocabulary], of the token that follows each token of `[DEC]` caption."""
    former = self.connector.former
    hidden = former.text_pass(self.connector.join(None, caption), visibility.ICG, context, key)
    return self.lm_head(hidden, former.words)

  def spatial_logits(self, context: KeyValue, spatial: TokenIds, key: Array | None = None) -> Array:
    """float32[B, Ts, vocabulary], of what stands at each place of `[MLM]` spatial representation, masked or not."""
    former = self.connector.former
    hidden = former.text_pass(self.connector.join(spatial, None), visibility.MSP, context, key)
    return self.lm_head(hidden, former.words)

  def passes(self, batch: Batch, key: Array | None = None) -> "AlignmentPasses":
    return AlignmentPasses(self, batch, key)

  def __call__(self, batch: Batch) -> AlignmentOutput:
    """All heads on B pairs; needs the fields of all published objectives."""
    passes = self.passes(batch)
    return AlignmentOutput(
        passes.images, passes.texts, passes.similarity, self.match(passes.key_values, passes.text),
        self.caption_logits(passes.context, (batch["icg_ids"], batch["caption_mask"])),
        self.spatial_logits(passes.context, (merge_pictures(batch["msp_ids"]), passes.spatial[1])))


class AlignmentPasses:
  """What the objectives of stage 1 share on one batch; each part is computed when first asked for, and only once."""

  _STREAMS = ("queries", "texts", "itm", "icg", "msp", "negatives")

  def __init__(self, model: Aligner, batch: Batch, key: Array | None):
    self.model, self.batch, self.root = model, batch, key
    self._keys = None if key is None else jax.random.split(key, len(self._STREAMS))

  def key(self, stream: str) -> Array | None:
    """The random key of a stream, such as an objective's name; None without dropout."""
    if self.root is None:
      return None
    if stream in self._STREAMS:
      return self._keys[self._STREAMS.index(stream)]
    return jax.random.fold_in(self.root, zlib.crc32(stream.encode()))

  @functools.cached_property
  def features(self) -> Features:
    return self.model.see(Pictures.of(self.batch))

  @functools.cached_property
  def key_values(self) -> PictureKeyValues:
    return self.model.key_values(self.features)

  @functools.cached_property
  def _queries(self) -> tuple[Array, KeyValue]:
    return self.model.encode_queries(self.key_values, self.key("queries"))

  @property
  def queries(self) -> Array:
    return self._queries[0]

  @property
  def context(self) -> KeyValue:
    return self._queries[1]

  @property
  def spatial(self) -> TokenIds:
    return merge_pictures(self.batch["spatial_ids"]), merge_pictures(self.batch["spatial_mask"])

  @property
  def caption(self) -> TokenIds:
    return self.batch["caption_ids"], self.batch["caption_mask"]

  @functools.cached_property
  def text(self) -> Text:
    return self.model.connector.join(self.spatial, self.caption)

  @functools.cached_property
  def images(self) -> Array:
    return self.model.encode_images(self.queries)

  @functools.cached_property
  def texts(self) -> Array:
    return self.model.encode_texts(self.text, self.key("texts"))

  @functools.cached_property
  def similarity(self) -> Array:
    return self.model.similarity(self.images, self.texts)


def _normalised(x: Array) -> Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
