"""Figures of several runs beside each other: a panel for each figure, a bar with its interval for each run."""

import dataclasses
import io
import math
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

_COLUMNS = 4
_COLOURS = matplotlib.colormaps["tab10"].colors


@dataclasses.dataclass(frozen=True)
class Panel:
  """One figure.

  Attributes:
    title: over the panel.
    names: of the bars, the first on top.
    values: lengths of the bars, in percent.
    halves: half widths of their intervals, 0 for none.
  """
  title: str
  names: Sequence[str]
  values: Sequence[float]
  halves: Sequence[float]


def draw(panels: Sequence[Panel]) -> bytes:
  """A PNG with all panels. A name has the same colour in every panel."""
  columns = min(_COLUMNS, len(panels))
  rows, most, colours = math.ceil(len(panels) / columns), 1, {}
  for panel in panels:
    most = max(most, len(panel.names))
    for name in panel.names:
      colours.setdefault(name, _COLOURS[len(colours) % len(_COLOURS)])
  figure = Figure(figsize=(3.6 * columns, (0.28 * most + 0.9) * rows), dpi=120, layout="constrained")
  for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels):
    places = range(len(panel.names))[::-1]
    shades = [colours[name] for name in panel.names]
    axes.barh(places, panel.values, xerr=panel.halves, color=shades, height=0.7, error_kw={"capsize": 2})
    axes.set(title=panel.title, xlim=(0, 100), yticks=places, yticklabels=panel.names)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
  for axes in figure.axes[len(panels):]:
    axes.set_visible(False)
  picture = io.BytesIO()
  figure.savefig(picture, format="png")
  return picture.getvalue()
