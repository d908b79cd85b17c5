"""Who may attend to whom in the MQ-Former: the visibility table of each objective (paper section 3.2, figure 3).

A sequence is made of four segments: V visual queries, G grounding queries, S spatial representation, C caption.
"""

import dataclasses
from itertools import product

import numpy as np

SEGMENTS = V, G, S, C = range(4)
_NUMBER = {"V": V, "G": G, "S": S, "C": C}


@dataclasses.dataclass(frozen=True)
class Visibility:
  """The pairs (from, to) of segments that see each other; `causal` restricts C -> C to the past."""
  pairs: frozenset[tuple[int, int]]
  causal: bool = False

  def table(self) -> np.ndarray:
    """bool[4, 4]: the row's segment may attend to the column's segment."""
    table = np.zeros((4, 4), bool)
    for source, target in self.pairs:
      table[source, target] = True
    return table

  def parts(self) -> list[list[int]]:
    """Groups of segments that see nothing of one another: attention may treat each group separately."""
    table = self.table()
    parts: list[list[int]] = []
    for segment in SEGMENTS:
      merged, apart = [segment], []
      for part in parts:
        if table[segment, part].any() or table[part, segment].any():
          merged += part
        else:
          apart.append(part)
      parts = [*apart, sorted(merged)]
    return parts


def _see(sources: str, targets: str) -> frozenset[tuple[int, int]]:
  return frozenset((_NUMBER[source], _NUMBER[target]) for source, target in product(sources, targets))


ITC = Visibility(_see("VG", "VG") | _see("SC", "SC"))
ITM = Visibility(_see("VC", "VC") | _see("GS", "GS"))
ICG = Visibility(_see("VG", "VG") | _see("C", "VGC"), causal=True)
MSP = Visibility(_see("VG", "VG") | _see("S", "VGS"))
INSTRUCT = Visibility(_see("VGSC", "VGSC"))
