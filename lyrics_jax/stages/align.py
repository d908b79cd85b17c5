"""Stage 1, representation alignment: L = L_itc + L_itm + L_icg + L_msp (paper section 3.3).

V visual queries, G grounding queries, S spatial representation, C caption; masks in `models/masks.py`. Queries attend to no
text in ITC, ICG and MSP, so one pass of them serves all three; their keys and values are handed to the text passes.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.config import Config, ItcPooling
from lyrics_jax.models import masks
from lyrics_jax.models.layers import ROWS
from lyrics_jax.models.lyrics import Features, LyricsForAlignment
from lyrics_jax.models.mq_former import KeyValue, Negatives, Sources, Text, spatial_and_caption
from lyrics_jax.stages.base import Array, Batch, Loss, cross_entropy, masked_mean, text_spec, visual_spec
from refiner_export.common.settings import require


class Align:
  def __init__(self, config: Config):
    self.config = config

  def build(self, rngs: nnx.Rngs) -> LyricsForAlignment:
    return LyricsForAlignment(self.config.model, self.config.align.temperature, rngs=rngs)

  def trains(self, path: str) -> bool:
    return not path.startswith("perception/vision/")

  def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    spatial, caption = self.config.data.spatial_length, self.config.data.caption_length
    return visual_spec(self.config) | text_spec(self.config.batch_size, {
        "spatial_ids": (spatial, jnp.int32), "spatial_mask": (spatial, jnp.bool_),
        "msp_ids": (spatial, jnp.int32), "msp_targets": (spatial, jnp.int32),
        "caption_ids": (caption, jnp.int32), "caption_mask": (caption, jnp.bool_), "icg_ids": (caption, jnp.int32)})

  def loss(self, model: LyricsForAlignment, batch: Batch, key: Array | None) -> Loss:
    query_key, text_key, itm_key, icg_key, msp_key, negatives_key = (
        [None] * 6 if key is None else jax.random.split(key, 6))
    mq_former, smoothing = model.perception.mq_former, self.config.align.label_smoothing
    require(mq_former.config.grounding_queries > 0, "config.model.mq_former.grounding_queries=0: ITC and ITM of stage align need "
                                                    "at least one; for none of the refiner, set config.model.use_refiner=false")
    features = model.perception.see(batch)
    sources = model.perception.look_at(features)
    queries, context = mq_former.query_pass(sources, query_key)
    text = self.text(model, batch)
    similarity = image_text_similarity(model, queries, text, self.config.align.itc_pooling, text_key)
    losses = {
        "itc": itc(similarity, smoothing),
        # Evaluation draws its negatives from a fixed key, so that two runs agree.
        "itm": itm(model, features, sources, text, similarity, batch["caption_ids"],
                   jax.random.key(0) if key is None else negatives_key, itm_key, self._blocks()),
        "icg": icg(model, context, batch, smoothing, icg_key),
        "msp": msp(model, context, batch, smoothing, msp_key),
    }
    return Loss(sum(losses.values()), jnp.float32(1), losses | {"temperature": model.temperature[...]})

  def text(self, model: LyricsForAlignment, batch: Batch) -> Text:
    """`[BOS]` spatial representation, then `[CLS]` caption."""
    return spatial_and_caption((batch["spatial_ids"], batch["spatial_mask"]), (batch["caption_ids"], batch["caption_mask"]),
                               model.perception.mq_former.config.restart_positions)

  def _blocks(self) -> int:
    """Within how many blocks of the batch negatives are drawn: one, or one per batch shard of the mesh in use."""
    return 1 if self.config.align.itm_negatives == "global" else _batch_shards()


def image_features(model: LyricsForAlignment, queries: Array, pooling: ItcPooling) -> Array:
  """L2-normalised float32[B, N, 256]: the N features of a picture, of which `itc` counts the most similar one.

  "mean" (the paper): one, the linear map of H_I = [mean(V); mean(G)]. "max" (BLIP-2 and the authors' code): one of each
  query, the same map of [v; 0] for a visual and of [0; g] for a grounding query.
  """
  if pooling == "mean":
    return _normalised(model.itc_image(jnp.concatenate(model.perception.mq_former.pool(queries), axis=-1)))[:, None]
  visual = model.perception.mq_former.config.visual_queries
  v, g = queries[:, :visual], queries[:, visual:]
  own_half = jnp.concatenate([jnp.pad(v, ((0, 0), (0, 0), (0, v.shape[-1]))), jnp.pad(g, ((0, 0), (0, 0), (g.shape[-1], 0)))], 1)
  return _normalised(model.itc_image(own_half))


def text_features(model: LyricsForAlignment, text: Text, key: Array | None = None) -> Array:
  """H_T = [h(BOS); h(CLS)] -> L2-normalised float32[B, 256]."""
  ends = text.segments.index(masks.S), text.segments.index(masks.C)
  hidden = model.perception.mq_former.text_pass(text, masks.ITC, None, key, read=ends)
  return _normalised(model.itc_text(hidden.reshape(len(hidden), -1)))


def image_text_similarity(model: LyricsForAlignment, queries: Array, text: Text, pooling: ItcPooling, key: Array | None) -> Array:
  """float32[B, B], row i the picture, column j the text, divided by the learnt temperature."""
  each = jnp.einsum("ind,jd->inj", image_features(model, queries, pooling), text_features(model, text, key))
  return each.max(1) / model.temperature[...]


def itc(similarity: Array, smoothing: float) -> Array:
  """Image-text contrastive loss over the global batch.

  A picture's similarity to a text is that of the most similar of the picture's features (see `image_features`): with
  config.align.itc_pooling = "mean" there is one, with "max" one of every visual and every grounding query. A text has one
  feature, of [BOS] and [CLS] together, either way. Hard negatives and retrieval go by the same similarity.

  L_itc = 1/2 (CE(s(I, T), y) + CE(s(T, I), y)), y the diagonal. Under `jit` the similarity matrix is of the whole global
  batch on any mesh; only the texts' [B, 256] features travel between devices.
  """
  targets = jnp.arange(similarity.shape[0])
  return (cross_entropy(similarity, targets, smoothing).mean() + cross_entropy(similarity.T, targets, smoothing).mean()) / 2


def hard_negatives(similarity: Array, caption_ids: Array, key: Array, blocks: int = 1) -> tuple[Array, Array, Array]:
  """Draws for each pair a negative picture and a negative text by the softmax of their similarity.

  Never the pair itself, nor one with the identical caption; with `blocks` > 1 only within the pair's own block of
  B / blocks pairs. Returns (pictures int32[B], texts int32[B], found bool[B]); `found` is False where there is no candidate.
  """
  count = similarity.shape[0]
  block = jnp.arange(count) // (count // blocks)
  barred = (caption_ids[:, None] == caption_ids[None]).all(-1) | (block[:, None] != block[None])
  weights = jnp.where(barred, -jnp.inf, jax.lax.stop_gradient(similarity).astype(jnp.float32))
  found = ~barred.all(-1)
  own = jnp.arange(count)
  picture_key, text_key = jax.random.split(key)
  pictures = jnp.where(found, jax.random.categorical(picture_key, weights.T, axis=-1), own)
  texts = jnp.where(found, jax.random.categorical(text_key, weights, axis=-1), own)
  return pictures, texts, found


def itm(model: LyricsForAlignment, features: Features, sources: Sources, text: Text, similarity: Array,
        caption_ids: Array, negatives_key: Array, key: Array | None, blocks: int = 1) -> Array:
  """Image-text matching: L_itm = E[CE(p(V), y) + CE(p(G), y)] / 2, y = 1 for the pair, 0 for its two hard negatives.

  p is one classifier over mean(V), which saw the caption, and over mean(G), which saw the spatial representation. The
  pictures' cross-attention keys and values are reused, not computed again.

  What travels between devices: the [B, B] similarity; with global negatives (`blocks` = 1) also the texts' ids and, once, the
  frozen features of the whole batch, of which each device picks its negatives and looks at those again. That is as much work as
  looking at its own pictures; the keys and values of all layers would be 20 times as many bytes, and their gradients as many
  again. With `blocks` = the number of batch shards (config.align.itm_negatives = "local", or one device) nothing travels, and
  the negatives' keys and values are looked up among the pictures'.
  """
  pictures, texts, found = hard_negatives(similarity, caption_ids, negatives_key, blocks)
  negatives = Negatives(pictures, blocks)
  negative = (sources.take(negatives) if blocks == _batch_shards()
              else model.perception.look_at(jax.tree.map(negatives.take, features)))
  queries, _ = model.perception.mq_former.joint_pass(
      sources.matching(negative), text.matching(Negatives(texts, blocks)), masks.ITM, key, read=())
  logits = jnp.stack([model.itm(pooled) for pooled in model.perception.mq_former.pool(queries)])
  targets = jnp.tile(jnp.array([1, 0, 0]), len(found))
  used = jnp.stack([jnp.ones_like(found), found, found], 1).reshape(-1)
  return masked_mean(cross_entropy(logits, jnp.broadcast_to(targets, logits.shape[:2])), jnp.broadcast_to(used, logits.shape[:2]))


def icg(model: LyricsForAlignment, context: KeyValue, batch: Batch, smoothing: float, key: Array | None) -> Array:
  """Image-grounded caption generation: L_icg = -E sum_t log p(c_t | c_<t, V, G), starting from [DEC]."""
  mq_former = model.perception.mq_former
  text = spatial_and_caption(None, (batch["icg_ids"], batch["caption_mask"]), mq_former.config.restart_positions)
  hidden = mq_former.text_pass(text, masks.ICG, context, key)
  logits = model.lm_head(hidden[:, :-1], mq_former.words)
  return masked_mean(cross_entropy(logits, batch["icg_ids"][:, 1:], smoothing), batch["caption_mask"][:, 1:])


def msp(model: LyricsForAlignment, context: KeyValue, batch: Batch, smoothing: float, key: Array | None) -> Array:
  """Masked spatial prediction: L_msp = -E sum over masked tokens of log p(s | the unmasked, V, G), starting from [MLM]."""
  mq_former = model.perception.mq_former
  text = spatial_and_caption((batch["msp_ids"], batch["spatial_mask"]), None, mq_former.config.restart_positions)
  logits = model.lm_head(mq_former.text_pass(text, masks.MSP, context, key), mq_former.words)
  targets = batch["msp_targets"]
  return masked_mean(cross_entropy(logits, jnp.maximum(targets, 0), smoothing), targets >= 0)


def _batch_shards() -> int:
  """Over how many devices the mesh in use splits the rows of a batch."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(axis, 1) for axis in ROWS)


def _normalised(x: Array) -> Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
