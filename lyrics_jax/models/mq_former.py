"""MQ-Former, the Multi-scale Querying Transformer (paper section 3.2).

An image transformer and a text transformer share each layer's self-attention. Visual queries cross-attend to the image
encoder's tokens, grounding queries to the refiner's local tokens, in every `cross_attention_frequency`-th layer. The layout
is BERT's (post-norm), as in BLIP-2, whose stage-1 checkpoint initialises it.

Three passes serve all objectives: `look` computes the cross-attention keys and values of a picture once, `query_pass` runs
the queries alone and keeps their self-attention keys and values, `text_pass` runs text against those. `joint_pass` runs
both together, for ITM and for instructions.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lyrics_jax.config import MQFormerConfig, Remat
from lyrics_jax.models import masks
from lyrics_jax.models.layers import (Array, Embedding, LayerNorm, Linear, Stack, attend, dropout, merge_heads, normal,
                                      parameter, split_heads, split_key, xavier_uniform)

KeyValue = tuple[Array, Array]
Masked = tuple[Array, Array, Array | None]  # keys and values [B, Tk, H, d], and where they may be looked at: bool[B, 1, 1, Tk]
Look = Callable[[Array], Array]  # queries [B, Tq, H, d] -> what they find, of the same shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Negatives:
  """One other row for each of B rows: `index`, int32[B].

  With `blocks` > 1 it stays within the row's own block of B / blocks rows: where each device holds a block, nothing travels.
  """
  index: Array
  blocks: int = dataclasses.field(default=1, metadata={"static": True})

  def take(self, rows: Array) -> Array:
    """rows[index] along axis 0, [B, ...]."""
    size = rows.shape[0] // self.blocks
    local = (self.index - jnp.arange(rows.shape[0]) // size * size).reshape(self.blocks, size)
    taken = jax.vmap(lambda block, i: jnp.take(block, i, axis=0))(rows.reshape(self.blocks, size, *rows.shape[1:]), local)
    return taken.reshape(rows.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sources:
  """Cross-attention keys and values of B pictures for every layer that has cross-attention (G groups of layers).

  `visual`: two arrays [G, B, T, H, d] of the image tokens. `grounding`: the same of the local tokens;
  `grounding_valid`: bool[B, T], False on padding. `negative`: see `matching`.
  """
  visual: KeyValue
  grounding: KeyValue
  grounding_valid: Array
  negative: "Sources | None" = None

  def matching(self, negative: "Sources") -> "Sources":
    """The sources of 3B pairs: each picture twice, then its negative, next to each other. No picture's own are copied."""
    return dataclasses.replace(self, negative=negative)

  def take(self, negatives: Negatives) -> "Sources":
    """The sources of each picture's negative."""
    take = jax.vmap(negatives.take)
    return Sources(*jax.tree.map(take, (self.visual, self.grounding)), negatives.take(self.grounding_valid))

  @property
  def pictures(self) -> list["Sources"]:
    """The pictures' own, and the negatives' where there are any."""
    return [self] if self.negative is None else [self, self.negative]

  @property
  def grounding_mask(self) -> Array:
    """bool[B, 1, 1, T], as `attend` takes it."""
    return self.grounding_valid[:, None, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Text:
  """Tokens of the text side. `ids`: int32[B, T]; `valid`: bool[B, T], False on padding; `positions`: int32[B, T].

  `segments`: int[T], masks.S or masks.C.
  """
  ids: Array
  valid: Array
  positions: Array
  segments: tuple[int, ...] = dataclasses.field(metadata={"static": True})

  def matching(self, negatives: Negatives) -> "Text":
    """The texts of the 3B pairs of `Sources.matching`: each text, its negative, and the text again."""
    triple = lambda own: jnp.stack([own, negatives.take(own), own], 1).reshape(-1, *own.shape[1:])
    return Text(triple(self.ids), triple(self.valid), triple(self.positions), self.segments)


def spatial_and_caption(spatial: tuple[Array, Array] | None, caption: tuple[Array, Array] | None, restart: bool) -> Text:
  """Joins `(ids, valid)` of the spatial representation and of the caption, either of which may be absent.

  With `restart` the caption's positions begin at 0 again, else after the last token of the spatial representation.
  """
  parts = [(segment, *part) for segment, part in ((masks.S, spatial), (masks.C, caption)) if part is not None]
  ids = jnp.concatenate([ids for _, ids, _ in parts], axis=1)
  valid = jnp.concatenate([valid for _, _, valid in parts], axis=1)
  positions, start = [], jnp.zeros((ids.shape[0], 1), jnp.int32)
  for _, part, part_valid in parts:
    positions.append(start + jnp.arange(part.shape[1], dtype=jnp.int32))
    start = start if restart else start + part_valid.sum(1, keepdims=True, dtype=jnp.int32)
  segments = sum(((segment,) * part.shape[1] for segment, part, _ in parts), ())
  return Text(ids, valid, jnp.concatenate(positions, axis=1), segments)


def attention_to(own: Masked, negative: Masked | None = None) -> Look:
  """Attention to a source: its keys, values and mask.

  With a `negative` source there are 3B rows of queries, three of one source next to each other, of which the third attends to
  the source's negative.
  """
  if negative is None:
    return lambda query: attend(query, *own)

  def look(query: Array) -> Array:
    sets = query.reshape(-1, 3, *query.shape[1:])
    twice = attend(sets[:, :2].reshape(len(sets), -1, *query.shape[2:]), *own).reshape(sets[:, :2].shape)
    return jnp.concatenate([twice, attend(sets[:, 2], *negative)[:, None]], axis=1).reshape(query.shape)

  return look


class Attention(nnx.Module):
  """Multi-head attention with output projection, residual and post-norm; `init` is Xavier for the grounding branch."""

  def __init__(self, config: MQFormerConfig, source_width: int, *, rngs: nnx.Rngs, **init):
    width, self.heads, self.rate = config.width, config.heads, config.dropout
    self.q = Linear(width, width, ("embed", "heads"), rngs=rngs, **init)
    self.k = Linear(source_width, width, ("embed", "heads"), rngs=rngs, **init)
    self.v = Linear(source_width, width, ("embed", "heads"), rngs=rngs, **init)
    self.o = Linear(width, width, ("heads", "embed"), rngs=rngs, **init)
    self.norm = LayerNorm(width, config.norm_eps, rngs=rngs)

  def keys_values(self, source: Array) -> KeyValue:
    return split_heads(self.k(source), self.heads), split_heads(self.v(source), self.heads)

  def __call__(self, x: Array, look: Look, key: Array | None) -> Array:
    y = self.o(merge_heads(look(split_heads(self.q(x), self.heads))))
    return self.norm(x + dropout(y, self.rate, key))


class FeedForward(nnx.Module):
  def __init__(self, config: MQFormerConfig, *, rngs: nnx.Rngs):
    self.up = Linear(config.width, config.mlp_dim, ("embed", "mlp"), rngs=rngs)
    self.down = Linear(config.mlp_dim, config.width, ("mlp", "embed"), rngs=rngs)
    self.norm = LayerNorm(config.width, config.norm_eps, rngs=rngs)
    self.activation, self.rate = config.activation, config.dropout

  def __call__(self, x: Array, key: Array | None) -> Array:
    y = self.up(x)
    y = jax.nn.gelu(y, approximate=False) if self.activation == "gelu" else jax.nn.relu(y)
    return self.norm(x + dropout(self.down(y), self.rate, key))


class MQFormerLayer(nnx.Module):
  def __init__(self, config: MQFormerConfig, image_width: int, cross: bool, *, rngs: nnx.Rngs):
    self.visual_queries = config.visual_queries
    self.self_attention = Attention(config, config.width, rngs=rngs)
    if cross:
      self.visual_attention = Attention(config, image_width, rngs=rngs)
      self.grounding_attention = Attention(config, config.width, rngs=rngs, init=xavier_uniform)
    self.query_mlp = FeedForward(config, rngs=rngs)
    self.text_mlp = FeedForward(config, rngs=rngs)

  def __call__(self, queries: Array | None, text: Array | None, context: KeyValue | None, sight: masks.Sight | None,
               visual: Look | None, grounding: Look | None, key: Array | None, read: tuple[int, ...] | None = None):
    """One layer over queries [B, Q, D] and text [B, T, D] (either may be absent).

    `context`: keys and values of queries that ran before, put in front of this pass's own. `sight`: who sees whom in the
    self-attention; None lets all see all. `visual`, `grounding`: attention to the sources, in a layer with cross-attention.
    `read`: the places of the text at which the output is read, None for all; the others have keys and values only. Returns
    (queries, text, this pass's own keys and values).
    """
    keys = split_key(key, 5)
    join = lambda *parts: jnp.concatenate([part for part in parts if part is not None], axis=1)
    hidden = join(queries, text)
    own = self.self_attention.keys_values(hidden)
    seen = own if context is None else tuple(jnp.concatenate([c, o], axis=1) for c, o in zip(context, own))
    if read is not None:
      hidden = join(queries, text[:, np.array(read, np.int32)])
    within = attend if sight is None else sight.attend
    hidden = self.self_attention(hidden, lambda query: within(query, *seen, None), keys[0])
    if queries is not None:
      queries, text = hidden[:, :queries.shape[1]], hidden[:, queries.shape[1]:] if text is not None else None
      if visual is not None:
        v, g = queries[:, :self.visual_queries], queries[:, self.visual_queries:]
        v = self.visual_attention(v, visual, keys[1])
        if g.shape[1]:
          g = self.grounding_attention(g, grounding, keys[2])
        queries = jnp.concatenate([v, g], axis=1)
      queries = self.query_mlp(queries, keys[3])
    else:
      text = hidden
    if text is not None:
      text = self.text_mlp(text, keys[4])
    return queries, text, own


class LayerGroup(nnx.Module):
  """A layer with cross-attention and the `cross_attention_frequency - 1` layers without that follow it."""

  def __init__(self, config: MQFormerConfig, image_width: int, *, rngs: nnx.Rngs):
    self.layers = nnx.List([MQFormerLayer(config, image_width, cross=n == 0, rngs=rngs)
                            for n in range(config.cross_attention_frequency)])


class MQFormer(nnx.Module):
  """See the module's docstring. `image_width`: width of the image encoder's tokens; `dtype`: of the computation."""

  def __init__(self, config: MQFormerConfig, image_width: int, *, dtype: jnp.dtype, remat: Remat = "none", rngs: nnx.Rngs):
    self.config, self.dtype, self.remat = config, dtype, remat
    count = config.visual_queries + config.grounding_queries
    self.queries = parameter(rngs, normal, (count, config.width), (None, "embed"))
    self.words = Embedding(config.vocab_size, config.width, rngs=rngs)
    self.positions = Embedding(config.max_positions, config.width, (None, "embed"), rngs=rngs)
    self.norm = LayerNorm(config.width, config.norm_eps, rngs=rngs)
    groups = config.layers // config.cross_attention_frequency
    self.stack = Stack(lambda rngs: LayerGroup(config, image_width, rngs=rngs), groups, rngs=rngs)

  @property
  def query_segments(self) -> np.ndarray:
    return np.repeat([masks.V, masks.G], [self.config.visual_queries, self.config.grounding_queries])

  def look(self, image_tokens: Array, local_tokens: Array, local_valid: Array) -> Sources:
    """Cross-attention keys and values of pictures, once for all passes.

    Args: image_tokens: [B, Ti, Di]; local_tokens: [B, Tl, D]; local_valid: bool[B, Tl].
    """
    def step(group, carry, _, __):
      layer = group.layers[0]
      return carry, (layer.visual_attention.keys_values(image_tokens), layer.grounding_attention.keys_values(local_tokens))

    _, (visual, grounding) = self.stack.scan(step, None)
    return Sources(visual, grounding, local_valid)

  def query_pass(self, sources: Sources, key: Array | None = None) -> tuple[Array, KeyValue]:
    """The queries alone, as ITC, ICG and MSP see them: hidden states [B, Q, D] and the keys and values [L/f, f, B, Q, H, d]."""
    queries, _, keys_values = self._run(sources, None, None, masks.ITC, key)
    return queries, keys_values

  def text_pass(self, text: Text, visibility: masks.Visibility, context: KeyValue | None, key: Array | None = None,
                read: tuple[int, ...] | None = None) -> Array:
    """Text alone ([B, T, D]); with `context` (from `query_pass`) it also sees the queries, as `visibility` allows.

    With `read` the result is that of these places only, [B, len(read), D]; the last layer leaves out what nothing reads.
    """
    return self._run(None, text, context, visibility, key, read)[1]

  def joint_pass(self, sources: Sources, text: Text, visibility: masks.Visibility, key: Array | None = None,
                 read: tuple[int, ...] | None = None) -> tuple[Array, Array]:
    """Queries and text together: hidden states [B, Q, D] and [B, T, D], of the text as in `text_pass`."""
    return self._run(sources, text, None, visibility, key, read)[:2]

  def pool(self, queries: Array) -> tuple[Array, Array]:
    """Means of the visual and of the grounding queries, each [B, D]."""
    visual = self.config.visual_queries
    return queries[:, :visual].mean(1), queries[:, visual:].mean(1)

  def _run(self, sources: Sources | None, text: Text | None, context: KeyValue | None, visibility: masks.Visibility,
           key: Array | None, read: tuple[int, ...] | None = None):
    embed_key, stack_key = split_key(key, 2)
    batch = text.ids.shape[0] if text is not None else sources.grounding_valid.shape[0]
    embedded, rows, valid = [], [], []
    if sources is not None:
      embedded.append(jnp.broadcast_to(self.queries[...], (batch, *self.queries.shape)))
      rows.append(self.query_segments)
      valid.append(jnp.ones((batch, len(self.query_segments)), bool))
    if text is not None:
      embedded.append(self.words(text.ids) + self.positions(text.positions))
      rows.append(np.array(text.segments))
      valid.append(text.valid)
    hidden = dropout(self.norm(jnp.concatenate(embedded, axis=1)), self.config.dropout, embed_key).astype(self.dtype)
    count = len(self.query_segments) if sources is not None else 0
    queries, words = hidden[:, :count] if count else None, hidden[:, count:] if text is not None else None

    columns = rows
    if context is not None:
      columns, valid = [self.query_segments, *rows], [jnp.ones((batch, len(self.query_segments)), bool), *valid]
    columns, valid = np.concatenate(columns), jnp.concatenate(valid, axis=1)
    sight = masks.Sight.of(visibility, np.concatenate(rows), columns, valid)
    pictures = [] if sources is None else sources.pictures

    def step(group, carry, x, key, end=(sight, None)):
      queries, words = carry
      keys_values, context = x
      cross, kept = (None, None), []
      if pictures:
        visual = [(*visual, None) for visual, _ in keys_values]
        grounding = [(*grounding, picture.grounding_mask) for (_, grounding), picture in zip(keys_values, pictures)]
        cross = attention_to(*visual), attention_to(*grounding)
      for n, (layer, layer_key) in enumerate(zip(group.layers, split_key(key, len(group.layers)))):
        before = None if context is None else jax.tree.map(lambda a: a[n], context)
        seen, read = end if n == len(group.layers) - 1 else (sight, None)
        queries, words, own = layer(queries, words, before, seen, *(cross if n == 0 else (None, None)), layer_key, read)
        kept.append(own)
      # Only the query pass hands its keys and values on; elsewhere they would be dead weight in memory.
      return (queries, words), jax.tree.map(lambda *a: jnp.stack(a), *kept) if text is None else None

    xs = ([(picture.visual, picture.grounding) for picture in pictures], context)
    last = None
    if read is not None:
      rows[-1] = rows[-1][list(read)]
      last = functools.partial(step, end=(masks.Sight.of(visibility, np.concatenate(rows), columns, valid), read))
    (queries, words), keys_values = self.stack.scan(step, (queries, words), xs, key=stack_key, remat=self.remat, last=last)
    return queries, words, keys_values
