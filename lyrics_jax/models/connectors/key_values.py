"""Cross-attention keys and values of pictures, and the negatives that ITM puts beside them."""

import dataclasses

import jax
import jax.numpy as jnp

from lyrics_jax.models.inputs import Text
from lyrics_jax.models.layers.attention import attend
from lyrics_jax.models.layers.parameter import Array

KeyValue = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Negatives:
  """One other row for each of B rows: `index`, int32[B].

  With `blocks` > 1 an index stays within its row's block of B / blocks rows. Where each device holds a block, nothing
  travels between devices.
  """
  index: Array
  blocks: int = dataclasses.field(default=1, metadata={"static": True})

  def take(self, rows: Array) -> Array:
    """rows[index] along axis 0, [B, ...]."""
    size = rows.shape[0] // self.blocks
    local = (self.index - jnp.arange(rows.shape[0]) // size * size).reshape(self.blocks, size)
    blocks = rows.reshape(self.blocks, size, *rows.shape[1:])
    return jax.vmap(_take_rows)(blocks, local).reshape(rows.shape)


def _take_rows(rows: Array, index: Array) -> Array:
  return jnp.take(rows, index, axis=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PictureKeyValues:
  """Cross-attention keys and values of B pictures, for each of the G layers that have cross-attention.

  `visual`: two arrays [G, B, T, H, d] of the image tokens. `grounding`: the same of the local tokens, and
  `grounding_valid`: bool[B, T], False on padding; both None without grounding queries. `negative`: see `matching`.
  """
  visual: KeyValue
  grounding: KeyValue | None = None
  grounding_valid: Array | None = None
  negative: "PictureKeyValues | None" = None

  def matching(self, negative: "PictureKeyValues") -> "PictureKeyValues":
    """Of 3B pairs: each picture twice, then its negative, next to each other.

    The pictures themselves are not copied.
    """
    return dataclasses.replace(self, negative=negative)

  def take(self, negatives: Negatives) -> "PictureKeyValues":
    """The keys and values of each picture's negative."""
    take = jax.vmap(negatives.take)
    visual, grounding = jax.tree.map(take, (self.visual, self.grounding))
    return PictureKeyValues(visual, grounding, jax.tree.map(negatives.take, self.grounding_valid))

  def pick(self, index: Array) -> "PictureKeyValues":
    """The keys and values of the pictures with these numbers, int32[B']."""
    def along_pictures(x: Array) -> Array:
      return jnp.take(x, index, axis=1)

    visual, grounding = jax.tree.map(along_pictures, (self.visual, self.grounding))
    valid = self.grounding_valid
    return PictureKeyValues(visual, grounding, None if valid is None else _take_rows(valid, index))

  @property
  def sets(self) -> list["PictureKeyValues"]:
    """The pictures, and behind them the negatives where there are any."""
    return [self] if self.negative is None else [self, self.negative]

  @property
  def rows(self) -> int:
    """How many rows of queries attend to these pictures."""
    pictures = self.visual[0].shape[1]
    return pictures if self.negative is None else 3 * pictures


def matching_text(text: Text, negatives: Negatives) -> Text:
  """The texts of the 3B pairs of `PictureKeyValues.matching`: each text, its negative, and the text again."""
  def triple(x: Array) -> Array:
    return jnp.stack([x, negatives.take(x), x], 1).reshape(-1, *x.shape[1:])

  return Text(triple(text.ids), triple(text.valid), triple(text.positions), text.segments)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Seen:
  """What one layer's queries of one kind attend to: keys and values [B, T, H, d], and where they may be looked at.

  `mask`: bool[B, 1, 1, T], or None for everywhere. `negative`: of the pictures' negatives, where there are any.
  """
  key: Array
  value: Array
  mask: Array | None = None
  negative: "Seen | None" = None

  def attend(self, query: Array) -> Array:
    """query: [B, Tq, H, d] -> the same shape.

    With a negative there are 3B rows of queries, three of one picture next to each other. The third of them attends to
    the picture's negative.
    """
    if self.negative is None:
      return attend(query, self.key, self.value, self.mask)
    triples = query.reshape(-1, 3, *query.shape[1:])
    pairs = triples[:, :2]
    positive = attend(pairs.reshape(len(pairs), -1, *query.shape[2:]), self.key, self.value, self.mask)
    negative = self.negative.attend(triples[:, 2])
    return jnp.concatenate([positive.reshape(pairs.shape), negative[:, None]], axis=1).reshape(query.shape)
