"""Runs the rows of the study one after the other. A run that is finished and measured is not run again."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import jax
from etils import epath

from lyrics_jax.config import Config
from lyrics_jax.data.loader import open_records
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.study.measure_align import measure_align
from lyrics_jax.study.measure_answers import measure_answers
from lyrics_jax.study.places import UNSEEN, Places
from lyrics_jax.study.presets import Preset
from lyrics_jax.study.rows import CLEAN, Row
from lyrics_jax.study.runs import Run, Runs
from lyrics_jax.study.start import Pieces
from lyrics_jax.study.world import make_world
from lyrics_jax.training import metrics
from lyrics_jax.training.checkpoint import saved_config
from lyrics_jax.training.loop import train
from lyrics_jax.training.parameters import ModelParameters
from refiner_export.common.files import write_atomically
from refiner_export.common.settings import require
from refiner_export.records.reader import RecordDirectory

Figures = dict[str, float]
Measure = Callable[[LoadedModel, RecordDirectory, int], Figures]


@dataclasses.dataclass(frozen=True)
class Result:
  """A row with one seed: figures by name, such as `test/rec`."""
  row: Row
  seed: int
  figures: Figures


class Study:
  """The runs of a preset below an output directory."""

  def __init__(self, preset: Preset, root: str):
    self.preset, self.places = preset, Places(root)
    self.runs = Runs(preset, self.places)

  def prepare(self, rows: Sequence[Row]) -> None:
    """Makes the records, and trains the image encoder and the language model that all rows start from."""
    for refiner in sorted({CLEAN, *(row.refiner for row in rows)}):
      make_world(self.preset, self.places, refiner)
    for run in self.runs.encoder(), self.runs.words():
      self._run(run)

  def row(self, row: Row, seed: int) -> Result:
    """Both stages of a row, and the figures of both."""
    figures = {}
    align = self.runs.align(row, seed)
    if align is not None:
      figures |= self._run(align, measure_align, row.refiner)
    figures |= self._run(self.runs.instruct(row, seed), measure_answers, row.refiner)
    return Result(row, seed, figures)

  def _run(self, run: Run, measure: Measure | None = None, refiner: str = CLEAN) -> Figures:
    """Trains from where it stands and measures; the figures of a finished run are read."""
    folder = epath.Path(run.config.output)
    if (folder / "config.json").exists():
      require(saved_config(str(folder)) == run.config,
              f"{folder} was made with other settings: name another --output, or remove it")
    file = folder / "figures.json"
    if file.exists():
      return json.loads(file.read_text())
    print(f"run {folder}: {run.config.steps} steps", flush=True)
    _train(run)
    figures = {}
    if measure is not None:
      loaded = LoadedModel.open(str(folder))
      for split in UNSEEN:
        directory = RecordDirectory(self.places.records(refiner, split))
        for name, value in measure(loaded, directory, self.preset.batch).items():
          figures[f"{split}/{name}"] = value
    figures |= _last_metrics(run.config)
    write_atomically(file, (json.dumps(figures, indent=2) + "\n").encode())
    jax.clear_caches()  # no other run has the same programs, and they fill the memory
    return figures


def _train(run: Run) -> None:
  def find_origin(parameters: ModelParameters) -> Pieces | None:
    return Pieces.find(run.pieces, parameters) if run.pieces else None

  train(run.config, open_records(run.config.data), find_origin)


def _last_metrics(config: Config) -> Figures:
  """The last loss of each objective and, where it is measured, how much soft tokens differ between pictures."""
  last, figures = metrics.read(config.output)[-1], {}
  for name in [objective.name for objective in config.stage.objectives] + ["soft_token_spread"]:
    if name in last:
      figures[f"train/{name}"] = last[name]
  return figures
