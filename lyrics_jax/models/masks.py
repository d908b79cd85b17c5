"""Who may attend to whom: the visibility table of each objective (paper section 3.3, figure 3), and masks made from it.

A sequence is made of four segments: V visual queries, G grounding queries, S spatial representation, C caption.
"""

import dataclasses
from itertools import product

import jax.numpy as jnp
import numpy as np

from lyrics_jax.models.layers import Array

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
