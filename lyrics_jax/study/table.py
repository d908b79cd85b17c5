"""Means and intervals over seeds, and the tables that show them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

STAGE_1 = {"i2t_r1": "R@1 text", "t2i_r1": "R@1 picture", "itm_visual": "ITM visual", "itm_grounding": "ITM grounding",
           "msp_tags": "MSP tags", "msp_tenths": "MSP tenths", "msp_digits": "MSP digits"}
STAGE_2 = {"rec": "REC", "count": "count", "colour": "colour", "shape": "shape", "relation": "relation",
           "presence": "yes/no", "region": "region"}

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds. `half` is the half width of its 95 % interval by Student's t; None for a single seed."""
  mean: float
  half: float | None
  seeds: int

  @classmethod
  def of(cls, values: Sequence[float]) -> "Estimate":
    count = len(values)
    if count == 1:
      return cls(float(values[0]), None, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return cls(float(np.mean(values)), float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * error, count)

  def percent(self) -> str:
    """Such as `61.2 ± 3.4`, in percent."""
    return f"{100 * self.mean:.1f}" + ("" if self.half is None else f" ± {100 * self.half:.1f}")


Estimates = Mapping[str, Mapping[str, Estimate]]  # by row, then by figure


def markdown(estimates: Estimates, about: Mapping[str, str], split: str, names: Mapping[str, str],
             chance: Mapping[str, float]) -> list[str]:
  """Lines of a table with one row for each row of the study, in percent.

  Args:
    about: what each row stands for.
    split: kind of scenes that is measured, such as "test".
    names: figures -> headings.
    chance: figures that one reaches without looking; shown as the last row where there is any.
  """
  lines = [_line("", *names.values()), _line("---", *["---:"] * len(names))]
  for row, figures in estimates.items():
    cells = []
    for figure in names:
      estimate = figures.get(f"{split}/{figure}")
      cells.append("" if estimate is None else estimate.percent())
    if any(cells):
      lines.append(_line(about[row], *cells))
  known = []
  for figure in names:
    known.append(f"{100 * chance[figure]:.1f}" if figure in chance else "")
  if any(known):
    lines.append(_line("without looking", *known))
  return lines


def _line(*cells: str) -> str:
  return f"| {' | '.join(cells)} |"
