"""What a person is told of an evaluation: loss curves, a few lines, and a page with photos, questions and answers."""

import dataclasses
import itertools
from collections.abc import Iterator

from absl import logging
from etils import epath

from lyrics_jax.data.spatial import without_pictures
from lyrics_jax.evaluation.questions import Answered
from lyrics_jax.tasks.scoring import RIGHT_IOU
from lyrics_jax.training import metrics
from lyrics_jax.training.checkpoint import saved_config
from refiner_export.common.settings import require
from refiner_export.pages import answers as answers_page
from refiner_export.pages.answers import AnswerRow
from refiner_export.pages.curves import Panel
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import Record


@dataclasses.dataclass(frozen=True)
class Curves:
  """The losses of one run. `run` is its directory's name; `entries` are those of its metrics.jsonl, at least one."""
  run: str
  objectives: tuple[str, ...]
  entries: list[dict[str, float]]

  @property
  def final(self) -> dict[str, float]:
    """The last value of each objective."""
    return {name: self.entries[-1][name] for name in self.objectives}

  @property
  def panel(self) -> Panel:
    steps, losses = [], {}
    for entry in self.entries:
      steps.append(entry["step"])
      for name in self.objectives:
        losses.setdefault(name, []).append(entry[name])
    return Panel(f"run {self.run}", steps, losses)


def read_curves(output: str) -> list[Curves]:
  """The curves of the run that `output` was initialised from, where that run is still there, and those of `output`.

  Raises `UserError` for a run without metrics.
  """
  earlier = saved_config(output).init_from
  if earlier and not (epath.Path(earlier) / "metrics.jsonl").exists():  # published weights have none
    logging.warning("no loss curves of what came before: there is no metrics.jsonl in %s", earlier)
    earlier = ""
  return [_read(earlier), _read(output)] if earlier else [_read(output)]


def lines(summary: dict, curves: list[Curves], trained_on: bool) -> Iterator[str]:
  """The outcome in words.

  Args:
    summary: see `questions.summarise`.
    trained_on: whether the run was trained on these very records.
  """
  for run in curves:
    losses = ", ".join(f"{name} {value:.2g}" for name, value in run.final.items())
    yield f"run {run.run}: final {'losses' if len(run.final) > 1 else 'loss'} {losses}"
  text, box = summary["text"], summary["box"]
  yield f"the records' own questions, about {provenance(trained_on)}:"
  if text["count"]:
    yield f"text answers: {100 * text['exact']:.0f} % exactly right, over {text['count']}"
  if box["count"]:
    yield (f"box answers: mean IoU {box['mean_iou']:.2f}, {100 * box['found']:.0f} % at IoU >= {RIGHT_IOU}, "
           f"over {box['count']}")


def provenance(trained_on: bool) -> str:
  if trained_on:
    return "the photos it was trained on (what is right is memorised, not understood)"
  return "other records than those it was trained on"


def page(directory: RecordDirectory, answered: list[Answered], summary: dict, trained_on: bool, run: str) -> str:
  """One self-contained HTML text with photos, questions, answers, and true and predicted boxes.

  Args:
    answered: the questions about a record follow each other.
    summary, trained_on: as in `lines`.
    run: names the run in the title.
  """
  records = len(set(map(_position, answered)))
  return answers_page.render(run, provenance(trained_on), _totals(summary), _by_record(directory, answered), records)


def _totals(summary: dict) -> list[tuple[str, str]]:
  """Names and values for the head of the page."""
  text, box = summary["text"], summary["box"]
  totals = []
  if text["count"]:
    totals += [("text answers", f"{text['count']:,}"), ("exactly right", f"{100 * text['exact']:.0f} %")]
  if box["count"]:
    totals += [("box answers", f"{box['count']:,}"), ("mean IoU", f"{box['mean_iou']:.2f}"),
               (f"IoU ≥ {RIGHT_IOU}", f"{100 * box['found']:.0f} %")]
  return totals


def _by_record(directory: RecordDirectory, answered: list[Answered]) -> Iterator[tuple[Record, list[AnswerRow]]]:
  """Each record with its rows; a record is read when its turn comes."""
  for position, answers in itertools.groupby(answered, key=_position):
    yield directory[position], [_row(answer) for answer in answers]


def _position(answer: Answered) -> int:
  return answer.position


def _row(answer: Answered) -> AnswerRow:
  score = ""
  if answer.kind == "box":
    score = f"IoU {answer.score:.2f}"
  elif answer.score is None:
    score = "not scored"
  question = without_pictures(answer.question)
  return AnswerRow(answer.task, question, answer.prediction, answer.answer, answer.right, score, answer.picture,
                   answer.true_box, answer.predicted_box)


def _read(output: str) -> Curves:
  entries = metrics.read(output)
  require(bool(entries), f"no metrics.jsonl in {output}, or nothing in it: loss curves need the run's whole directory")
  names = tuple(objective.name for objective in saved_config(output).stage.objectives)
  return Curves(epath.Path(output).absolute().name, names, entries)
