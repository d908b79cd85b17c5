"""Where the MQ-Former's queries look: the cross-attention weights of its query pass (paper section 3.1).

In the model attention is one fused operation, which never holds these weights. So the layers run as in `query_pass`,
and the weights are computed beside them. The queries run without text, as ITC, ICG and MSP see them. In a run that lets
the instruction in, the queries look at slightly other places.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lyrics_jax.models import visibility as see
from lyrics_jax.models.connectors.key_values import PictureKeyValues, Seen
from lyrics_jax.models.connectors.mq_former import Hidden, LayerGroup, MQFormer
from lyrics_jax.models.connectors.sight import Sight
from lyrics_jax.models.layers.parameter import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CrossAttention:
  """The weights of B pictures, over the G layers that have cross-attention. The weights of a query sum to 1.

  `visual`: float32[G, B, H, V, Ti], visual queries over the image encoder's tokens, the class token first. `grounding`:
  float32[G, B, H, Q, Tl], grounding queries over detection rows, then mask tokens. Padding has the weight 0; where
  there is nothing but padding, all weights are 0. Without grounding queries Q and Tl are 0. `queries`: [B, V + Q, D],
  the last hidden states.
  """
  visual: Array
  grounding: Array
  queries: Array


def cross_attention_weights(mq_former: MQFormer, pictures: PictureKeyValues) -> CrossAttention:
  """The weights of `mq_former.query_pass(pictures)`."""
  segments = mq_former.query_segments
  everyone = jnp.ones((pictures.rows, len(segments)), bool)
  sight = Sight.of(see.ITC, segments, segments, everyone)
  sights = [sight] * mq_former.settings.cross_attention_frequency

  def step(group: LayerGroup, hidden: Hidden, key_values, _):
    visual, grounding = key_values
    seen = [Seen(*visual)]
    if grounding is not None:
      seen.append(Seen(*grounding, pictures.grounding_valid[:, None, None, :]))
    weights = _layer_weights(group, hidden.queries, sight, seen)
    hidden, _ = group(hidden, sights, None, seen, None)
    return hidden, weights

  start = mq_former.embed(pictures, None, None)
  hidden, (visual, grounding) = mq_former.stack.scan(step, start, (pictures.visual, pictures.grounding))
  return CrossAttention(visual, grounding, hidden.queries)


def _layer_weights(group: LayerGroup, queries: Array, sight: Sight, seen: list[Seen]) -> tuple[Array, Array]:
  """The weights of a group's first layer, of visual and of grounding queries; `queries`: [B, V + Q, D], its input."""
  layer = group.layers[0]
  attention = layer.self_attention
  found = sight.attend(attention.query(queries), *attention.key_value(queries))
  queries = attention.finish(queries, found, None)
  visual, grounding = queries[:, :layer.visual_queries], queries[:, layer.visual_queries:]
  of_visual = attention_weights(layer.visual_attention.query(visual), seen[0])
  if len(seen) == 1:
    return of_visual, jnp.zeros((*of_visual.shape[:2], 0, 0))
  return of_visual, attention_weights(layer.grounding_attention.query(grounding), seen[1])


def attention_weights(query: Array, seen: Seen) -> Array:
  """query: [B, Q, H, d] -> float32[B, H, Q, T], the share of each seen token in what each query finds."""
  logits = jnp.einsum("bqhd,bthd->bhqt", query, seen.key, preferred_element_type=jnp.float32)
  logits = logits / math.sqrt(query.shape[-1])
  if seen.mask is None:
    return jax.nn.softmax(logits)
  return jax.nn.softmax(jnp.where(seen.mask, logits, jnp.finfo(jnp.float32).min)) * seen.mask
