"""Image-text matching with hard negatives (paper section 3.2)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lyrics_jax.models.aligner import AlignerSettings, AlignmentPasses
from lyrics_jax.models.connectors.key_values import Negatives, PictureKeyValues, matching_text
from lyrics_jax.models.inputs import Text
from lyrics_jax.models.visibility import S
from lyrics_jax.objectives.base import Array, Objective, Term, cross_entropy, masked_mean
from lyrics_jax.objectives.itc import same_picture
from lyrics_jax.sharding import batch_shards


@dataclasses.dataclass(unsafe_hash=True)
class ITM(Objective):
  """L_itm = E[CE(p(V), y) + CE(p(G), y)] / 2, y = 1 for the pair, 0 for its two hard negatives.

  p is one classifier over mean(V), which saw the caption, and over mean(G), which saw the spatial representation. Where
  a text names no object, G saw nothing that could tell a pair, so the mean over G leaves such rows out. The pictures'
  cross-attention keys and values are reused, not computed again.

  Attributes:
    negatives: "global", drawn from the whole batch, or "local", from the pairs of the same device.
  """
  name = "itm"
  model = AlignerSettings
  reads = ("picture_id", "spatial_ids", "spatial_mask", "caption_ids", "caption_mask")
  negatives: Literal["global", "local"] = "global"

  def __call__(self, passes: AlignmentPasses) -> Term:
    key = passes.key("negatives")
    # Evaluation draws its negatives from a fixed key, so that two runs agree.
    key = jax.random.key(0) if key is None else key
    blocks = 1 if self.negatives == "global" else batch_shards()
    pictures, texts, found = hard_negatives(passes.similarity, no_negatives(passes.batch), key, blocks)
    positive = passes.key_values
    negative = _negative_key_values(passes, Negatives(pictures, blocks))
    triples = matching_text(passes.text, Negatives(texts, blocks))
    logits = passes.model.match(positive.matching(negative), triples, passes.key(self.name))
    targets = jnp.tile(jnp.array([1, 0, 0]), len(found))
    used = jnp.stack([jnp.ones_like(found), found, found], 1).reshape(-1)
    loss = cross_entropy(logits, jnp.broadcast_to(targets, logits.shape[:2]))
    return Term(_mean_of_halves(loss, jnp.stack([used, used & _names_object(triples)])))


def no_negatives(batch: dict[str, Array]) -> Array:
  """bool[B, B]: whether two pairs of a batch have the same picture or the same caption."""
  captions = batch["caption_ids"]
  return same_picture(batch) | (captions[:, None] == captions[None]).all(-1)


def _names_object(text: Text) -> Array:
  """bool[B]: whether the spatial representation says more than its first token, [BOS]."""
  spatial = jnp.array(text.segments) == S
  return (text.valid & spatial).sum(1) > 1


def _mean_of_halves(loss: Array, used: Array) -> Array:
  """The mean over rows of each half, then over the halves that have a row; loss: [2, rows], used: bool[2, rows]."""
  means = jnp.stack([masked_mean(loss[half], used[half]) for half in range(2)])
  return masked_mean(means, used.any(1))


def _negative_key_values(passes: AlignmentPasses, negatives: Negatives) -> PictureKeyValues:
  """The keys and values of the negative pictures.

  With negatives from the device's own block they are looked up among the pictures', and nothing travels. With global
  negatives the frozen features of the whole batch travel once, and each device computes the keys and values of its
  negatives from them. That is as much work as for its own pictures. The keys and values of all layers would be 20 times
  as many bytes, and their gradients as many again.
  """
  if negatives.blocks == batch_shards():
    return passes.key_values.take(negatives)
  return passes.model.key_values(jax.tree.map(negatives.take, passes.features))


def hard_negatives(similarity: Array, barred: Array, key: Array, blocks: int = 1) -> tuple[Array, Array, Array]:
  """Draws for each pair a negative picture and a negative text by the softmax of their similarity.

  Args:
    similarity: [B, B], row the picture, column the text.
    barred: bool[B, B], symmetric: pairs that are no negatives of each other, such as a pair and itself.
    blocks: with more than 1, only pairs of the same block of B / blocks pairs are drawn.

  Returns:
    (pictures int32[B], texts int32[B], found bool[B]); `found` is False where there is no candidate.
  """
  count = similarity.shape[0]
  places = jnp.arange(count)
  block = places // (count // blocks)
  barred = barred | (block[:, None] != block[None])
  weights = jnp.where(barred, -jnp.inf, jax.lax.stop_gradient(similarity).astype(jnp.float32))
  found = ~barred.all(-1)
  picture_key, text_key = jax.random.split(key)
  pictures = jnp.where(found, jax.random.categorical(picture_key, weights.T, axis=-1), places)
  texts = jnp.where(found, jax.random.categorical(text_key, weights, axis=-1), places)
  return pictures, texts, found
