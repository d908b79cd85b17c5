"""Who may attend to whom: the visibility table of each objective (paper section 3.3, figure 3), and masks made from it.

A sequence is made of four segments: V visual queries, G grounding queries, S spatial representation, C caption.
"""

import dataclasses
from itertools import groupby, product

import jax
import jax.numpy as jnp
import numpy as np

from lyrics_jax.models.layers import Array, attend

V, G, S, C = range(4)
_NUMBER = {"V": V, "G": G, "S": S, "C": C}


@dataclasses.dataclass(frozen=True)
class Visibility:
  """The pairs (from, to) of segments that see each other; `causal` restricts C -> C to the past."""
  pairs: frozenset[tuple[int, int]]
  causal: bool = False

  def table(self) -> np.ndarray:
    """bool[4, 4]: row may attend to column."""
    table = np.zeros((4, 4), bool)
    for source, target in self.pairs:
      table[source, target] = True
    return table

  def parts(self) -> list[list[int]]:
    """The segments in parts that see nothing of one another: attention may treat each part for itself."""
    table = self.table()
    parts = []
    for segment in range(4):
      linked = [part for part in parts if table[segment, part].any() or table[part, segment].any()]
      parts = [part for part in parts if part not in linked] + [sorted(sum(linked, [segment]))]
    return parts


def _see(sources: str, targets: str) -> frozenset[tuple[int, int]]:
  return frozenset((_NUMBER[a], _NUMBER[b]) for a, b in product(sources, targets))


ITC = Visibility(_see("VG", "VG") | _see("SC", "SC"))
ITM = Visibility(_see("VC", "VC") | _see("GS", "GS"))
ICG = Visibility(_see("VG", "VG") | _see("C", "VGC"), causal=True)
MSP = Visibility(_see("VG", "VG") | _see("S", "VGS"))
INSTRUCT = Visibility(_see("VGSC", "VGSC"))


def attention_mask(visibility: Visibility, rows: np.ndarray, columns: np.ndarray, valid: Array) -> Array:
  """bool[B, 1, R, K]: may row r look at column k.

  Args:
    rows: int[R], the segment of each attending position; columns: int[K], of each attended one. Of equal segments the
      positions run alike, which is what `causal` compares.
    valid: bool[B, K], False on padding.
  """
  allowed = visibility.table()[rows][:, columns]
  if visibility.causal:
    order = lambda segments: np.arange(len(segments)) - np.argmax(segments == C)
    late = (rows == C)[:, None] & (columns == C)[None, :] & (order(columns)[None, :] > order(rows)[:, None])
    allowed = allowed & ~late
  return jnp.asarray(allowed)[None, None] & valid[:, None, None, :]


Slices = tuple[slice, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sight:
  """Self-attention part by part: rows that see nothing of one another share no matrix product.

  `parts`: of each part the rows and the columns, as slices of the sequences. `masks`: of each part `attention_mask`.
  """
  masks: list[Array]
  parts: tuple[tuple[Slices, Slices], ...] = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(cls, visibility: Visibility, rows: np.ndarray, columns: np.ndarray, valid: Array) -> "Sight":
    """Arguments as of `attention_mask`."""
    parts, masks = [], []
    for part in visibility.parts():
      if np.isin(rows, part).any():
        own, seen = _slices(rows, part), _slices(columns, part)
        pick = lambda segments, slices: np.concatenate([segments[s] for s in slices])
        parts.append((own, seen))
        masks.append(attention_mask(visibility, pick(rows, own), pick(columns, seen),
                                    jnp.concatenate([valid[:, s] for s in seen], axis=1)))
    return cls(masks, tuple(parts))

  def attend(self, query: Array, key: Array, value: Array, _: None) -> Array:
    """`layers.attend` under these masks."""
    pick = lambda x, slices: jnp.concatenate([x[:, s] for s in slices], axis=1)
    pieces = {}
    for (rows, columns), mask in zip(self.parts, self.masks):
      out = attend(pick(query, rows), pick(key, columns), pick(value, columns), mask)
      ends = np.cumsum([s.stop - s.start for s in rows])
      pieces |= {s.start: piece for s, piece in zip(rows, jnp.split(out, ends[:-1], axis=1))}
    return jnp.concatenate([pieces[start] for start in sorted(pieces)], axis=1)


def _slices(segments: np.ndarray, part: list[int]) -> Slices:
  """Where the segments of a part stand."""
  runs, start = [], 0
  for inside, run in groupby(np.isin(segments, part)):
    stop = start + len(list(run))
    runs += [slice(start, stop)] if inside else []
    start = stop
  return tuple(runs)
