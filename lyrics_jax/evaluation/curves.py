"""The loss curves of a run, and of the run whose parameters it started from."""

import dataclasses
import io

from absl import logging
from etils import epath
from matplotlib.figure import Figure

from lyrics_jax.training import metrics
from lyrics_jax.training.checkpoint import saved_config
from refiner_export.common.settings import require

OBJECTIVES = {"align": ("itc", "itm", "icg", "msp"), "instruct": ("lm",)}


@dataclasses.dataclass(frozen=True)
class Curves:
  """The metrics of one run: `entries` as in its metrics.jsonl, at least one."""
  stage: str
  entries: list[dict[str, float]]

  @property
  def final(self) -> dict[str, float]:
    """The last value of each objective."""
    return {name: self.entries[-1][name] for name in OBJECTIVES[self.stage]}


def read_curves(output: str) -> list[Curves]:
  """Of the run that `output` was initialised from, where it is still there, and of `output` itself.

  Raises `UserError` for a run without metrics.
  """
  earlier = saved_config(output).init_from
  if earlier and not (epath.Path(earlier) / "metrics.jsonl").exists():  # published weights have none
    logging.warning("no loss curves of what came before: there is no metrics.jsonl in %s", earlier)
    earlier = ""
  return [_read(run) for run in (earlier, output) if run]


def draw(curves: list[Curves]) -> bytes:
  """A PNG with one panel per run and one line per objective, on a logarithmic axis: losses fall by orders of magnitude."""
  figure = Figure(figsize=(5.6 * len(curves), 3.9), dpi=140, layout="constrained")
  for axes, run in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
    steps = [entry["step"] for entry in run.entries]
    for name, last in run.final.items():
      axes.plot(steps, [entry[name] for entry in run.entries], label=f"{name}  {last:.3g}", linewidth=1.6,
                marker="o" if len(steps) == 1 else None)  # a single point makes no line
    axes.set(title=f"stage {run.stage}", xlabel="step", ylabel="loss", yscale="log")
    axes.grid(which="major", alpha=0.3)
    axes.grid(which="minor", alpha=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="objective, last value", frameon=False)
  picture = io.BytesIO()
  figure.savefig(picture, format="png")
  return picture.getvalue()


def _read(output: str) -> Curves:
  entries = metrics.read(output)
  require(bool(entries), f"no metrics.jsonl in {output}, or nothing in it: loss curves need the whole directory of the run")
  return Curves(saved_config(output).stage, entries)
