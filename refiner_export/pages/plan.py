"""A training plan in one picture: what fills the HBM, and where the time of a step goes."""

import io

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = matplotlib.colormaps["tab10"].colors


def draw(
    title: str, memory: dict[str, float], capacity: float, parts: dict[str, float], bounds: dict[str, float],
) -> bytes:
  """A PNG.

  Args:
    title: over the picture.
    memory: what fills a chip's HBM, in GiB.
    capacity: of a chip's HBM, in GiB.
    parts: what the predicted time of a step consists of, in milliseconds.
    bounds: the least times that a step can take, in milliseconds.
  """
  figure = Figure(figsize=(10, 4.2), layout="constrained")
  upper, lower = figure.subplots(2, 1)
  _stack(upper, 0, memory)
  upper.axvline(capacity, color="black", linewidth=2)
  upper.text(capacity, 0.45, " a chip's HBM", va="bottom", ha="right")
  widest = max(capacity, sum(memory.values()))
  upper.set(xlabel="GiB per chip", yticks=[], xlim=(0, 1.05 * widest), ylim=(-0.5, 0.8))

  _stack(lower, len(bounds), parts)
  rows = range(len(bounds))[::-1]
  lower.barh(rows, bounds.values(), color="lightgrey", height=0.7)
  names = ["predicted step"]
  for name in bounds:
    names.append(f"bound: {name}")
  lower.set(xlabel="milliseconds per step", yticks=[len(bounds), *rows], yticklabels=names)
  for axes in (upper, lower):
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
  figure.suptitle(title, fontsize=11)
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=120)
  return data.getvalue()


def _stack(axes: Axes, height: float, parts: dict[str, float]) -> None:
  """One bar at `height`, whose parts follow each other."""
  start = 0.0
  for colour, (name, size) in zip(_COLOURS, parts.items()):
    axes.barh(height, size, left=start, color=colour, label=name, height=0.7)
    start += size
