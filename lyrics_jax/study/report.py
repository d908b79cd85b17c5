"""What the study writes: `study.json`, `tables.md`, and plots of the rows and of the losses."""

import json
from collections.abc import Mapping, Sequence

from etils import epath

from lyrics_jax.evaluation.report import read_curves
from lyrics_jax.study.kinds import commonest
from lyrics_jax.study.measure_answers import scored_questions
from lyrics_jax.study.places import UNSEEN, Places
from lyrics_jax.study.rows import CLEAN, find_row
from lyrics_jax.study.study import Result
from lyrics_jax.study.table import STAGE_1, STAGE_2, Estimate, markdown
from lyrics_jax.tasks import TASKS
from refiner_export.common.files import write_atomically
from refiner_export.pages import bars, curves
from refiner_export.records.reader import RecordDirectory

_TITLES = {"test": "Unseen scenes", "held_out": "Unseen scenes with unseen combinations of colour and shape"}


def estimates_of(results: Sequence[Result]) -> dict[str, dict[str, Estimate]]:
  """Row -> figure -> estimate over the seeds, in the order of the results."""
  values: dict[str, dict[str, list[float]]] = {}
  for result in results:
    of_row = values.setdefault(result.row.name, {})
    for figure, value in result.figures.items():
      of_row.setdefault(figure, []).append(value)
  estimates = {}
  for row, figures in values.items():
    estimates[row] = {figure: Estimate.of(of_seeds) for figure, of_seeds in figures.items()}
  return estimates


def write(preset: str, places: Places, results: Sequence[Result]) -> list[str]:
  """Writes all files anew from the results so far, and returns the lines of the tables."""
  root, estimates, about = epath.Path(places.root), estimates_of(results), {}
  for row in estimates:
    about[row] = find_row(row).about
  lines, chances = [], {}
  for split in UNSEEN:
    chances[split] = _chance(RecordDirectory(places.records(CLEAN, split)))
    for stage, names in (1, STAGE_1), (2, STAGE_2):
      lines += [f"{_TITLES[split]}, stage {stage}, percent:", ""]
      lines += [*markdown(estimates, about, split, names, chances[split]), ""]
  write_atomically(root / "tables.md", "\n".join(lines).encode())
  write_atomically(root / "study.json", _json(preset, results, estimates, chances))
  write_atomically(root / "rows.png", bars.draw(_panels(estimates, about)))
  first = results[0]
  for stage in "align", "instruct":
    folder = places.run(first.row.name, first.seed, stage)
    if (epath.Path(folder) / "metrics.jsonl").exists():
      panels = [run.panel for run in read_curves(folder)]
      write_atomically(root / f"losses_{stage}.png", curves.draw(panels))
  return lines


def _chance(directory: RecordDirectory) -> dict[str, float]:
  """What one reaches without looking: recall of a random rank, the commonest answer of each kind of question."""
  recall = 1 / len(directory)
  return {"i2t_r1": recall, "t2i_r1": recall, "itm_visual": 0.5, "itm_grounding": 0.5,
          **commonest(scored_questions(directory, TASKS))}


def _json(preset: str, results: Sequence[Result], estimates: Mapping, chances: Mapping) -> bytes:
  runs, rows = [], {}
  for result in results:
    runs.append({"row": result.row.name, "seed": result.seed, "figures": result.figures})
  for row, figures in estimates.items():
    rows[row] = {}
    for figure, estimate in figures.items():
      rows[row][figure] = {"mean": estimate.mean, "half_width_95": estimate.half, "seeds": estimate.seeds}
  content = {"preset": preset, "rows": rows, "without_looking": chances, "runs": runs}
  return (json.dumps(content, indent=2) + "\n").encode()


def _panels(estimates: Mapping[str, Mapping[str, Estimate]], about: Mapping[str, str]) -> list[bars.Panel]:
  """One panel for each figure of unseen scenes."""
  panels = []
  for figure, title in (STAGE_1 | STAGE_2).items():
    names, means, halves = [], [], []
    for row, figures in estimates.items():
      estimate = figures.get(f"test/{figure}")
      if estimate is not None:
        names.append(about[row])
        means.append(100 * estimate.mean)
        halves.append(100 * (estimate.half or 0))
    if names:
      panels.append(bars.Panel(title, names, means, halves))
  return panels
