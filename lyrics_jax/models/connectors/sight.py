"""A visibility table applied to the tokens of a pass: masks, and self-attention part by part."""

import dataclasses
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from lyrics_jax.models.visibility import C, Visibility
from lyrics_jax.models.layers.attention import attend
from lyrics_jax.models.layers.parameter import Array

Slices = tuple[slice, ...]


def attention_mask(visibility: Visibility, rows: np.ndarray, columns: np.ndarray, valid: Array) -> Array:
  """bool[B, 1, R, K]: may row r look at column k.

  Args:
    rows: int[R], the segment of each attending position; columns: int[K], of each attended one. Positions within equal
      segments run alike in both, which is what `causal` compares.
    valid: bool[B, K], False on padding.
  """
  allowed = visibility.table()[rows][:, columns]
  if visibility.causal:
    both = (rows == C)[:, None] & (columns == C)[None, :]
    late = _place(columns)[None, :] > _place(rows)[:, None]
    allowed = allowed & ~(both & late)
  return jnp.asarray(allowed)[None, None] & valid[:, None, None, :]


def _place(segments: np.ndarray) -> np.ndarray:
  """int[T]: each position counted from the first one of the caption."""
  return np.arange(len(segments)) - np.argmax(segments == C)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sight:
  """Who sees whom in a layer's self-attention. Rows that see nothing of one another share no matrix product.

  `masks`: `attention_mask` of each part. `parts`: of each part the rows and the columns, as slices of the sequences.
  `read`: the places of the text at which the layer's output is read, None for all. The other places have keys and
  values only.
  """
  masks: list[Array]
  parts: tuple[tuple[Slices, Slices], ...] = dataclasses.field(metadata={"static": True})
  read: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

  @classmethod
  def of(cls, visibility: Visibility, rows: np.ndarray, columns: np.ndarray, valid: Array,
         read: tuple[int, ...] | None = None) -> "Sight":
    """Arguments as of `attention_mask`; `rows` are those that are left by `read`."""
    parts, masks = [], []
    for part in visibility.parts():
      if not np.isin(rows, part).any():
        continue
      row_slices, column_slices = _slices(rows, part), _slices(columns, part)
      parts.append((row_slices, column_slices))
      seen = jnp.concatenate([valid[:, piece] for piece in column_slices], axis=1)
      masks.append(attention_mask(visibility, _pick(rows, row_slices), _pick(columns, column_slices), seen))
    return cls(masks, tuple(parts), read)

  def attend(self, query: Array, key: Array, value: Array) -> Array:
    """`attend` under these masks: [B, R, H, d], [B, K, H, d] twice -> [B, R, H, d]."""
    pieces = {}  # by the first row of each piece
    for (rows, columns), mask in zip(self.parts, self.masks):
      out = attend(_take(query, rows), _take(key, columns), _take(value, columns), mask)
      start = 0
      for piece in rows:
        length = piece.stop - piece.start
        pieces[piece.start] = out[:, start:start + length]
        start += length
    return jnp.concatenate([pieces[start] for start in sorted(pieces)], axis=1)


def _pick(segments: np.ndarray, slices: Slices) -> np.ndarray:
  return np.concatenate([segments[piece] for piece in slices])


def _take(x: Array, slices: Slices) -> Array:
  return jnp.concatenate([x[:, piece] for piece in slices], axis=1)


def _slices(segments: np.ndarray, part: list[int]) -> Slices:
  """Where the segments of a part stand."""
  runs, start = [], 0
  for inside, run in groupby(np.isin(segments, part)):
    stop = start + len(list(run))
    if inside:
      runs.append(slice(start, stop))
    start = stop
  return tuple(runs)
