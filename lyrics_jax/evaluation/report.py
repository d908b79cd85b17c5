"""What a person is told of an evaluation: a few lines, and a page with every photo, question and answer."""

import itertools
import pathlib
import re
from collections.abc import Iterator

from lyrics_jax.evaluation.curves import Curves
from lyrics_jax.evaluation.questions import Answered
from lyrics_jax.evaluation.scoring import RIGHT_IOU
from refiner_export.pages import page
from refiner_export.records.reader import RecordDirectory

TRUE, PREDICTED = "#1f6fe5", "#e4570c"  # solid and dashed
_ASKED = "#6b7280"
_SHOWN = 200  # photos on the page: a browser must still open it
_TEMPLATE = pathlib.Path(__file__).parent / "answers.html.jinja"
_WRITTEN_BOX = re.compile(r"<Bbox>\s*(.*?)\s*</Box>")


def lines(summary: dict, curves: list[Curves], trained_on: bool) -> Iterator[str]:
  """The outcome in words; `summary` as of `questions.summarise`, `trained_on` when training saw these very records."""
  for run in curves:
    yield f"stage {run.stage}: final loss{'es'[:2 * (len(run.final) > 1)]} " + ", ".join(
        f"{name} {value:.2g}" for name, value in run.final.items())
  text, box = summary["text"], summary["box"]
  yield f"the records' own questions, about {provenance(trained_on)}:"
  if text["count"]:
    yield f"text answers: {100 * text['exact']:.0f} % exactly right, over {text['count']}"
  if box["count"]:
    yield (f"box answers: mean IoU {box['mean_iou']:.2f}, {100 * box['found']:.0f} % at IoU >= {RIGHT_IOU}, "
           f"over {box['count']}")


def provenance(trained_on: bool) -> str:
  return ("the photos it was trained on (what is right is memorised, not understood)" if trained_on
          else "other records than those it was trained on")


def render(directory: RecordDirectory, answered: list[Answered], summary: dict, trained_on: bool, run: str) -> str:
  """One self-contained HTML text: the first photos with true and predicted boxes, questions and answers. All escaped."""
  by_record = itertools.groupby(answered, key=lambda each: each.position)
  cards = [_card(directory, position, list(some)) for position, some in itertools.islice(by_record, _SHOWN)]
  return page.render(
      _TEMPLATE, cards=cards, shown=len(cards), records=len({each.position for each in answered}), summary=summary,
      run=run, provenance=provenance(trained_on), threshold=RIGHT_IOU,
      true_colour=TRUE, predicted_colour=PREDICTED)


def _card(directory: RecordDirectory, position: int, answered: list[Answered]) -> dict:
  boxes, rows, number = [], [], itertools.count(1)
  for each in answered:
    label = str(next(number)) if each.kind == "box" else ""
    if each.true_box is not None:
      boxes.append(page.Box.of(each.true_box, label, TRUE))
    if each.predicted_box is not None:
      boxes.append(page.Box.of(each.predicted_box, label, PREDICTED, dashed=True))
    rows.append({"label": label, "task": each.task, "kind": each.kind, "score": each.score, "right": each.right,
                 "question": _parts(each.question, _ASKED), "prediction": _parts(each.prediction, PREDICTED),
                 "expected": _parts("" if each.right or each.prediction == each.answer else each.answer, TRUE)})
  return page.card(directory[position], boxes, directory.manifest) | {"rows": rows}


def _parts(text: str, colour: str) -> list[page.Part]:
  """Splits a text at the boxes written in it, which become chips."""
  pieces = _WRITTEN_BOX.split(text)
  return [page.Part(piece, colour if position % 2 else "") for position, piece in enumerate(pieces) if piece]
