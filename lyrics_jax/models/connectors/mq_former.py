"""MQ-Former, the Multi-scale Querying Transformer (paper section 3.1).

An image transformer and a text transformer share each layer's self-attention. Visual queries cross-attend to the image
encoder's tokens, grounding queries to the refiner's local tokens, in every `cross_attention_frequency`-th layer. The
layout is BERT's (post-norm), as in BLIP-2, whose stage-1 checkpoint initialises it. Without grounding queries it is
BLIP-2's Q-Former.

Three passes serve all objectives. `key_values` computes the cross-attention keys and values of a picture once.
`query_pass` runs the queries alone and keeps their self-attention keys and values; `text_pass` runs text against those.
`joint_pass` runs both together, for ITM and for instructions.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lyrics_jax.models import visibility as see
from lyrics_jax.models.connectors.key_values import KeyValue, PictureKeyValues, Seen
from lyrics_jax.models.connectors.sight import Sight
from lyrics_jax.models.visibility import Visibility
from lyrics_jax.models.inputs import Text
from lyrics_jax.models.layers.activations import ACTIVATIONS
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.dropout import dropout, split_key
from lyrics_jax.models.layers.embedding import Embedding
from lyrics_jax.models.layers.linear import Linear, merge_heads, split_heads
from lyrics_jax.models.layers.norms import LayerNorm
from lyrics_jax.models.layers.parameter import Array, normal, parameter, xavier_uniform
from lyrics_jax.models.layers.stack import Stack
from refiner_export.common.checks import at_least, below_one, heads_divide
from refiner_export.common.settings import Settings, require


@dataclasses.dataclass(unsafe_hash=True)
class MQFormerSettings(Settings):
  """The published size is BERT-base's.

  Attributes:
    cross_attention_frequency: 2 puts cross-attention into layers 0, 2, 4, ..., as BLIP-2 does; 1 into every layer.
    activation: of the feed-forward layers; gelu when initialised from BLIP-2.
    vocab_size: rows of the word embedding, at least the tokenizer's size.
    restart_positions: whether the caption's positions begin at 0 again after the spatial representation.
  """
  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  visual_queries: int = 32
  grounding_queries: int = 32
  cross_attention_frequency: int = 2
  activation: Literal["relu", "gelu"] = "relu"
  vocab_size: int = 30592
  max_positions: int = 512
  restart_positions: bool = True
  dropout: float = 0.1
  norm_eps: float = 1e-12

  @property
  def queries(self) -> int:
    return self.visual_queries + self.grounding_queries

  def check(self, path: str) -> None:
    at_least(self, path, 1, "width", "layers", "heads", "mlp_dim", "visual_queries", "cross_attention_frequency",
             "vocab_size", "max_positions")
    at_least(self, path, 0, "grounding_queries")
    below_one(self, path, "dropout")
    heads_divide(path, self.width, self.heads)
    require(self.layers % self.cross_attention_frequency == 0,
            f"{path}.layers={self.layers} is not a multiple of "
            f"{path}.cross_attention_frequency={self.cross_attention_frequency}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Hidden:
  """Hidden states of a pass: `queries` [B, Q, D] and `text` [B, T, D]; either may be absent."""
  queries: Array | None
  text: Array | None

  def joined(self, read: tuple[int, ...] | None = None) -> Array:
    """Queries, then text, [B, Q + T, D]; with `read`, of the text these places only."""
    parts = [] if self.queries is None else [self.queries]
    if self.text is not None:
      parts.append(self.text if read is None else self.text[:, np.array(read, np.int32)])
    return jnp.concatenate(parts, axis=1)

  def like(self, joined: Array) -> "Hidden":
    """The parts of `joined`, which has as many queries as this one."""
    if self.queries is None:
      return Hidden(None, joined)
    count = self.queries.shape[1]
    return Hidden(joined[:, :count], None if self.text is None else joined[:, count:])


class Attention(nnx.Module):
  """Multi-head attention with output projection, residual and post-norm; `init` is Xavier for the grounding branch."""

  def __init__(self, settings: MQFormerSettings, source_width: int, *, rngs: nnx.Rngs, **init):
    width, self.heads, self.rate = settings.width, settings.heads, settings.dropout
    self.q = Linear(width, width, ("embed", "heads"), rngs=rngs, **init)
    self.k = Linear(source_width, width, ("embed", "heads"), rngs=rngs, **init)
    self.v = Linear(source_width, width, ("embed", "heads"), rngs=rngs, **init)
    self.o = Linear(width, width, ("heads", "embed"), rngs=rngs, **init)
    self.norm = LayerNorm(width, settings.norm_eps, rngs=rngs)

  def key_value(self, source: Array) -> KeyValue:
    """[B, T, D'] -> two arrays [B, T, H, d]."""
    return split_heads(self.k(source), self.heads), split_heads(self.v(source), self.heads)

  def query(self, x: Array) -> Array:
    """[B, T, D] -> [B, T, H, d]."""
    return split_heads(self.q(x), self.heads)

  def finish(self, x: Array, found: Array, key: Array | None) -> Array:
    """x: [B, T, D], and what its queries found, [B, T, H, d] -> [B, T, D]."""
    return self.norm(x + dropout(self.o(merge_heads(found)), self.rate, key))


class FeedForward(nnx.Module):
  """Two linear maps, residual and post-norm: [B, T, D] -> [B, T, D]."""

  def __init__(self, settings: MQFormerSettings, *, rngs: nnx.Rngs):
    self.up = Linear(settings.width, settings.mlp_dim, ("embed", "mlp"), rngs=rngs)
    self.down = Linear(settings.mlp_dim, settings.width, ("mlp", "embed"), rngs=rngs)
    self.norm = LayerNorm(settings.width, settings.norm_eps, rngs=rngs)
    self.activation, self.rate = settings.activation, settings.dropout

  def __call__(self, x: Array, key: Array | None) -> Array:
    y = ACTIVATIONS[self.activation](self.up(x))
    return self.norm(x + dropout(self.down(y), self.rate, key))


class MQFormerLayer(nnx.Module):
  """Queries and text share the self-attention. Each kind of query has a cross-attention, each side a feed-forward."""

  def __init__(self, settings: MQFormerSettings, image_width: int, cross: bool, *, rngs: nnx.Rngs):
    self.visual_queries = settings.visual_queries
    self.self_attention = Attention(settings, settings.width, rngs=rngs)
    if cross:
      self.visual_attention = Attention(settings, image_width, rngs=rngs)
    if cross and settings.grounding_queries:
      self.grounding_attention = Attention(settings, settings.width, rngs=rngs, init=xavier_uniform)
    self.query_mlp = FeedForward(settings, rngs=rngs)
    self.text_mlp = FeedForward(settings, rngs=rngs)

  def __call__(self, hidden: Hidden, sight: Sight, context: KeyValue | None, seen: list[Seen],
               key: Array | None) -> tuple[Hidden, KeyValue]:
    """One layer over queries and text.

    Args:
      sight: who sees whom in the self-attention, and at which places of the text the output is read.
      context: keys and values of queries that ran before; they stand in front of this pass's.
      seen: what visual and grounding queries attend to, in a layer with cross-attention; else empty.

    Returns:
      The hidden states, and this pass's keys and values of the self-attention.
    """
    keys = split_key(key, 5)
    key_value = self.self_attention.key_value(hidden.joined())
    within = key_value if context is None else jax.tree.map(_behind, context, key_value)
    x = hidden.joined(sight.read)
    found = sight.attend(self.self_attention.query(x), *within)
    hidden = hidden.like(self.self_attention.finish(x, found, keys[0]))
    if hidden.queries is not None:
      hidden.queries = self.query_mlp(self._cross_attend(hidden.queries, seen, keys), keys[3])
    if hidden.text is not None:
      hidden.text = self.text_mlp(hidden.text, keys[4])
    return hidden, key_value

  def _cross_attend(self, queries: Array, seen: list[Seen], keys) -> Array:
    if not seen:
      return queries
    visual = queries[:, :self.visual_queries]
    parts = [self.visual_attention.finish(visual, seen[0].attend(self.visual_attention.query(visual)), keys[1])]
    if len(seen) > 1:
      grounding = queries[:, self.visual_queries:]
      found = seen[1].attend(self.grounding_attention.query(grounding))
      parts.append(self.grounding_attention.finish(grounding, found, keys[2]))
    return jnp.concatenate(parts, axis=1)


def _behind(before: Array, after: Array) -> Array:
  """[B, T, H, d] and [B, T', H, d] -> [B, T + T', H, d]."""
  return jnp.concatenate([before, after], axis=1)


class LayerGroup(nnx.Module):
  """A layer with cross-attention and the `cross_attention_frequency - 1` layers without that follow it."""

  def __init__(self, settings: MQFormerSettings, image_width: int, *, rngs: nnx.Rngs):
    layers = []
    for n in range(settings.cross_attention_frequency):
      layers.append(MQFormerLayer(settings, image_width, cross=n == 0, rngs=rngs))
    self.layers = nnx.List(layers)

  def __call__(self, hidden: Hidden, sights: list[Sight], context: KeyValue | None, seen: list[Seen],
               key: Array | None) -> tuple[Hidden, list[KeyValue]]:
    """Applies the layers; `sights` has one entry per layer, `context` a leading axis of layers."""
    kept = []
    for n, layer_key in enumerate(split_key(key, len(self.layers))):
      layer_context = None if context is None else jax.tree.map(lambda a: a[n], context)
      layer_seen = seen if n == 0 else []
      hidden, key_value = self.layers[n](hidden, sights[n], layer_context, layer_seen, layer_key)
      kept.append(key_value)
    return hidden, kept


class MQFormer(nnx.Module):
  """See the module's docstring. `image_width`: width of the image encoder's tokens."""

  def __init__(self, settings: MQFormerSettings, image_width: int, compute: Compute = Compute(), *, rngs: nnx.Rngs):
    self.settings, self.dtype, self.remat = settings, compute.activations, compute.remat
    self.queries = parameter(rngs, normal, (settings.queries, settings.width), (None, "embed"))
    self.words = Embedding(settings.vocab_size, settings.width, rngs=rngs)
    self.positions = Embedding(settings.max_positions, settings.width, (None, "embed"), rngs=rngs)
    self.norm = LayerNorm(settings.width, settings.norm_eps, rngs=rngs)
    groups = settings.layers // settings.cross_attention_frequency
    self.stack = Stack(lambda rngs: LayerGroup(settings, image_width, rngs=rngs), groups, rngs=rngs)

  @property
  def query_segments(self) -> np.ndarray:
    return np.repeat([see.V, see.G], [self.settings.visual_queries, self.settings.grounding_queries])

  def key_values(self, image: Array, local: Array | None = None, local_valid: Array | None = None) -> PictureKeyValues:
    """Cross-attention keys and values of pictures, computed once for all passes.

    Args: image: [B, Ti, Di]; local: [B, Tl, D] and local_valid: bool[B, Tl], None without grounding queries.
    """
    def step(group: LayerGroup, carry, _, __):
      layer = group.layers[0]
      grounding = None if local is None else layer.grounding_attention.key_value(local)
      return carry, (layer.visual_attention.key_value(image), grounding)

    _, (visual, grounding) = self.stack.scan(step, None)
    return PictureKeyValues(visual, grounding, local_valid)

  def query_pass(self, pictures: PictureKeyValues, key: Array | None = None) -> tuple[Array, KeyValue]:
    """The queries alone, as ITC, ICG and MSP see them.

    Returns:
      Hidden states [B, Q, D], and keys and values [L/f, f, B, Q, H, d] for `text_pass`.
    """
    hidden, kept = self._run(pictures, None, None, see.ITC, key)
    return hidden.queries, kept

  def text_pass(self, text: Text, visibility: Visibility, context: KeyValue | None, key: Array | None = None,
                read: tuple[int, ...] | None = None) -> Array:
    """Text alone, [B, T, D]; with `context` (from `query_pass`) it also sees the queries, as `visibility` allows.

    With `read` the result has only these places, [B, len(read), D]; the last layer leaves out what nothing reads.
    """
    return self._run(None, text, context, visibility, key, read)[0].text

  def joint_pass(self, pictures: PictureKeyValues, text: Text, visibility: Visibility, key: Array | None = None,
                 read: tuple[int, ...] | None = None) -> tuple[Array, Array]:
    """Queries and text together: hidden states [B, Q, D] and [B, T, D]; the text's as in `text_pass`."""
    hidden, _ = self._run(pictures, text, None, visibility, key, read)
    return hidden.queries, hidden.text

  def pool(self, queries: Array) -> list[Array]:
    """Means of the visual and of the grounding queries, [B, D] each; without grounding queries only the first."""
    visual = self.settings.visual_queries
    means = [queries[:, :visual].mean(1)]
    if self.settings.grounding_queries:
      means.append(queries[:, visual:].mean(1))
    return means

  def embed(self, pictures: PictureKeyValues | None, text: Text | None, key: Array | None) -> Hidden:
    """The first hidden states: learnt queries, and words at their positions, after norm and dropout."""
    queries = words = None
    if pictures is not None:
      queries = jnp.broadcast_to(self.queries[...], (pictures.rows, *self.queries.shape))
    if text is not None:
      words = self.words(text.ids) + self.positions(text.positions)
    raw = Hidden(queries, words)
    return raw.like(dropout(self.norm(raw.joined()), self.settings.dropout, key).astype(self.dtype))

  def _sight(self, pictures: PictureKeyValues | None, text: Text | None, context: KeyValue | None,
             visibility: Visibility, read: tuple[int, ...] | None = None) -> Sight:
    """Who sees whom: rows are this pass's queries and text; columns have the context's queries in front."""
    batch = len(text.ids) if text is not None else pictures.rows
    all_queries = jnp.ones((batch, self.settings.queries), bool)
    rows, columns, valid = [], [], []
    if pictures is not None:
      rows.append(self.query_segments)
    if pictures is not None or context is not None:
      columns.append(self.query_segments)
      valid.append(all_queries)
    if text is not None:
      segments = np.array(text.segments)
      rows.append(segments if read is None else segments[list(read)])
      columns.append(segments)
      valid.append(text.valid)
    return Sight.of(visibility, np.concatenate(rows), np.concatenate(columns), jnp.concatenate(valid, axis=1), read)

  def _run(self, pictures: PictureKeyValues | None, text: Text | None, context: KeyValue | None,
           visibility: Visibility, key: Array | None, read: tuple[int, ...] | None = None):
    embed_key, stack_key = split_key(key, 2)
    sight = self._sight(pictures, text, context, visibility)
    sights = [sight] * self.settings.cross_attention_frequency
    # Only the query pass hands on its keys and values; those of other passes would be dead weight in memory.
    keeps = text is None
    sets = [] if pictures is None else pictures.sets

    def apply(group: LayerGroup, hidden: Hidden, slices, key: Array | None, sights: list[Sight]):
      layer_sets, layer_context = slices
      hidden, kept = group(hidden, sights, layer_context, _seen(sets, layer_sets), key)
      return hidden, jax.tree.map(lambda *layers: jnp.stack(layers), *kept) if keeps else None

    slices = [(each.visual, each.grounding) for each in sets], context
    last = None
    if read is not None:
      last_sight = self._sight(pictures, text, context, visibility, read)
      last = functools.partial(apply, sights=[*sights[:-1], last_sight])
    return self.stack.scan(functools.partial(apply, sights=sights), self.embed(pictures, text, embed_key), slices,
                           key=stack_key, remat=self.remat, last=last)


def _seen(sets: list[PictureKeyValues], layer: list[tuple[KeyValue, KeyValue | None]]) -> list[Seen]:
  """What one layer's visual and grounding queries attend to, from the keys and values of that layer."""
  visual = grounding = None
  for pictures, (of_visual, of_grounding) in reversed(list(zip(sets, layer))):
    visual = Seen(*of_visual, None, visual)
    if of_grounding is not None:
      grounding = Seen(*of_grounding, pictures.grounding_valid[:, None, None, :], grounding)
  return [] if visual is None else [visual] if grounding is None else [visual, grounding]
