"""One HTML page of an evaluation: photos with true and predicted boxes, questions and answers."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from refiner_export.pages import page
from refiner_export.records.record import Record

TRUE, PREDICTED = "#1f6fe5", "#e4570c"  # the colours of true boxes, which are solid, and of predicted boxes, dashed
SHOWN = 200  # records on the page: a browser must still open it

_ASKED = "#6b7280"
_WRITTEN_BOX = re.compile(r"<Bbox>\s*(.*?)\s*</Box>")


@dataclasses.dataclass(frozen=True)
class AnswerRow:
  """A question about a record with the model's answer.

  Attributes:
    task: the instruction family.
    question, prediction, answer: texts; `<Bbox> ... </Box>` in them becomes a chip.
    right: whether the prediction counts as right; None where it is not scored.
    score: a text beside the mark, such as `IoU 0.83`.
    picture: the number of the picture that the boxes lie in.
    true_box, predicted_box: (4,) xyxy in [0, 1]. A row with a true box has a number, which labels both boxes.
  """
  task: str
  question: str
  prediction: str
  answer: str
  right: bool | None = None
  score: str = ""
  picture: int = 0
  true_box: np.ndarray | None = None
  predicted_box: np.ndarray | None = None


def render(
    run: str, provenance: str, totals: Sequence[tuple[str, str]],
    answers: Iterable[tuple[Record, Sequence[AnswerRow]]], records: int,
) -> str:
  """One self-contained HTML text. All texts are escaped.

  Args:
    run: the name of the run that answered.
    provenance: which photos the questions are about, for people.
    totals: name and formatted value of each figure, such as ("mean IoU", "0.83").
    answers: the records with their rows, in order; the first `SHOWN` of them are read and shown.
    records: how many records there are in all.
  """
  cards = []
  for record, rows in itertools.islice(answers, SHOWN):
    cards.append(_card(record, rows))
  return page.render(
      "answers.html.jinja", run=run, provenance=provenance, totals=totals, cards=cards, shown=len(cards),
      records=records, true_colour=TRUE, predicted_colour=PREDICTED)


def _card(record: Record, rows: Sequence[AnswerRow]) -> dict:
  boxes: list[list[page.Box]] = [[] for _ in record.pictures]
  shown, numbered = [], 0
  for row in rows:
    label = ""
    if row.true_box is not None:
      numbered += 1
      label = str(numbered)
      boxes[row.picture].append(page.Box.of(row.true_box, label, TRUE))
    if row.predicted_box is not None:
      boxes[row.picture].append(page.Box.of(row.predicted_box, label, PREDICTED, dashed=True))
    known = row.right or row.prediction == row.answer  # the answer would only repeat the prediction
    shown.append({
        "label": label, "task": row.task, "score": row.score, "right": row.right,
        "question": _parts(row.question, _ASKED), "prediction": _parts(row.prediction, PREDICTED),
        "expected": _parts("" if known else row.answer, TRUE)})
  photos = []
  for picture, drawn in zip(record.pictures, boxes):
    photos.append(page.photo(picture, drawn, alt=record.id))
  return {"id": record.id, "photos": photos, "credit": page.credits(record), "rows": shown}


def _parts(text: str, colour: str) -> list[page.Part]:
  """Splits a text at the boxes written in it, which become chips."""
  parts = []
  # `split` returns the plain text at even positions and the boxes between them.
  for position, piece in enumerate(_WRITTEN_BOX.split(text)):
    if piece:
      parts.append(page.Part(piece, colour if position % 2 else ""))
  return parts
