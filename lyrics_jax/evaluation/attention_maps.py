"""Where the MQ-Former's queries look: the cross-attention weights of its query pass (paper section 3.2).

The model itself never has these weights in hand (attention is one fused operation), so the pass is replayed with the
model's own layers, and the weights are computed beside it. It is the queries' own pass, without text, as ITC, ICG and MSP
see it; where a stage-2 run lets the instruction in, its queries look a little elsewhere.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lyrics_jax.models.layers import Array, split_heads
from lyrics_jax.models.mq_former import Attention, MQFormer, Sources, attention_to


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CrossAttention:
  """Of B pictures, over the G layers that have cross-attention.

  `visual`: float32[G, B, H, V, Ti], visual queries over the image encoder's tokens, the class token first. `grounding`:
  float32[G, B, H, Q, Tl], grounding queries over detection rows, then mask tokens. Weights of a query sum to 1; padding
  has 0, and so has everything where there is nothing but padding. `queries`: [B, V + Q, D], the last hidden state.
  """
  visual: Array
  grounding: Array
  queries: Array


def cross_attention_weights(mq_former: MQFormer, sources: Sources) -> CrossAttention:
  """Replays `mq_former.query_pass(sources)` and returns its weights."""
  batch, visual_queries = len(sources.grounding_valid), mq_former.config.visual_queries
  queries = mq_former.norm(jnp.broadcast_to(mq_former.queries[...], (batch, *mq_former.queries.shape))).astype(mq_former.dtype)
  everywhere = jnp.ones(sources.visual[0].shape[1:3], bool)

  def step(group, queries, source, _):
    visual, grounding = source
    first, *rest = group.layers
    hidden = first.self_attention(queries, attention_to((*first.self_attention.keys_values(queries), None)), None)
    weights = (attention_weights(first.visual_attention, hidden[:, :visual_queries], visual[0], everywhere),
               attention_weights(first.grounding_attention, hidden[:, visual_queries:], grounding[0], sources.grounding_valid))
    looks = attention_to((*visual, None)), attention_to((*grounding, sources.grounding_mask))
    queries = first(queries, None, None, None, *looks, None)[0]
    for layer in rest:
      queries = layer(queries, None, None, None, None, None, None)[0]
    return queries, weights

  queries, (visual, grounding) = mq_former.stack.scan(step, queries, (sources.visual, sources.grounding))
  return CrossAttention(visual, grounding, queries)


def attention_weights(attention: Attention, x: Array, keys: Array, valid: Array) -> Array:
  """float32[B, H, Q, T]: how much each query x, [B, Q, D], takes of each token with keys [B, T, H, d] and valid bool[B, T]."""
  query = split_heads(attention.q(x), attention.heads)
  logits = jnp.einsum("bqhd,bthd->bhqt", query, keys, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
  valid = valid[:, None, None, :]
  return jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(jnp.float32).min)) * valid
