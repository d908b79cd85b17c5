"""A plan in one picture: what fills the HBM, and where the time of a step goes."""

import io

import matplotlib
from matplotlib.figure import Figure

from lyrics_jax.planning.report import GIB, Report

_COLOURS = matplotlib.colormaps["tab10"].colors


def draw(report: Report) -> bytes:
  """A PNG."""
  figure = Figure(figsize=(10, 4.2), layout="constrained")
  memory, time = figure.subplots(2, 1)
  _bar(memory, 0, {kind: size / GIB for kind, size in report.hbm.items()})
  memory.axvline(report.hbm_capacity / GIB, color="black", linewidth=2)
  memory.text(report.hbm_capacity / GIB, 0.45, " a chip's HBM", va="bottom", ha="right")
  memory.set(xlabel="GiB per chip", yticks=[], xlim=(0, 1.05 * max(report.hbm_capacity, sum(report.hbm.values())) / GIB), ylim=(-0.5, 0.8))

  parts = {name: seconds * 1e3 for name, seconds in report.seconds.items() if not name.startswith("bound") and name[0] != "o"}
  _bar(time, 3, parts)
  bounds = {name.removeprefix("bound: "): seconds * 1e3 for name, seconds in report.seconds.items() if name.startswith("bound")}
  time.barh(range(len(bounds))[::-1], bounds.values(), color="lightgrey", height=0.7)
  time.set(xlabel="milliseconds per step", yticks=[3, *range(len(bounds))[::-1]],
           yticklabels=["predicted step", *(f"bound: {name}" for name in bounds)])
  for axes in (memory, time):
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
  figure.suptitle(f"stage {report.stage} on {report.topology}: {report.step_seconds:.3f} s per step, MFU {report.mfu:.1%}, "
                  f"{report.chip_hours:,.0f} chip-hours", fontsize=11)
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=120)
  return data.getvalue()


def _bar(axes, height: float, parts: dict[str, float]) -> None:
  start = 0.0
  for colour, (name, size) in zip(_COLOURS, parts.items()):
    axes.barh(height, size, left=start, color=colour, label=name, height=0.7)
    start += size
