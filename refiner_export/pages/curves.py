"""The loss curves of runs."""

import dataclasses
import io
from collections.abc import Sequence

from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Panel:
  """The curves of one run.

  Attributes:
    title: over the panel.
    steps: of the values, at least one.
    losses: name -> a value per step.
  """
  title: str
  steps: Sequence[int]
  losses: dict[str, Sequence[float]]


def draw(panels: Sequence[Panel]) -> bytes:
  """A PNG with one panel per run and one line per loss. The axis is logarithmic: losses fall by orders of magnitude."""
  figure = Figure(figsize=(5.6 * len(panels), 3.9), dpi=140, layout="constrained")
  for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
    marker = "o" if len(panel.steps) == 1 else None  # a single point makes no line
    for name, values in panel.losses.items():
      axes.plot(panel.steps, values, label=f"{name}  {values[-1]:.3g}", linewidth=1.6, marker=marker)
    axes.set(title=panel.title, xlabel="step", ylabel="loss", yscale="log")
    axes.grid(which="major", alpha=0.3)
    axes.grid(which="minor", alpha=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="objective, last value", frameon=False)
  picture = io.BytesIO()
  figure.savefig(picture, format="png")
  return picture.getvalue()
