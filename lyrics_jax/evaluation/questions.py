"""The questions that records bring along: the first one of every conversation, with its answer."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lyrics_jax.data.errors import about
from lyrics_jax.data.instructions import instruction
from lyrics_jax.data.loader import Records
from lyrics_jax.data.spatial import fill_boxes, parse_boxes
from lyrics_jax.evaluation import scoring
from refiner_export.records.record import BOX_PLACEHOLDER, Record


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about the record at `position`, in the first template of its family; texts may hold `<box K>`.

  `kind` is how its answer is scored: "box" for a single box, "text" word for word, "open" not at all, because without
  a question (write a caption) many answers are right.
  """
  position: int
  task: str
  text: str
  answer: str
  kind: str


@dataclasses.dataclass(frozen=True)
class Answered:
  """A question with what the model said. `score` is 0 or 1 of a text, the IoU of a box, None of an open question.

  `record` is the name of the record at `position`. `question` and `answer` have their boxes written out, as the model
  reads and writes them. `true_box` and `predicted_box` are (4,) xyxy in [0, 1]; only box answers have them.
  """
  position: int
  record: str
  task: str
  kind: str
  question: str
  answer: str
  prediction: str
  score: float | None
  true_box: np.ndarray | None = None
  predicted_box: np.ndarray | None = None

  @property
  def right(self) -> bool | None:
    threshold = scoring.RIGHT_IOU if self.kind == "box" else 1
    return None if self.score is None else self.score >= threshold


def first_questions(records: Records) -> Iterator[Question]:
  """Reads all records once, in order."""
  for position in range(len(records)):
    record = records[position]
    for conversation in record.conversations:
      asked, answer = (turn.text.strip() for turn in conversation.turns[:2])
      kind = "box" if BOX_PLACEHOLDER.fullmatch(answer) else "text" if asked else "open"
      with about(record):
        yield Question(position, conversation.task, instruction(conversation.task, asked), answer, kind)


def judge(question: Question, record: Record, prediction: str, coordinates: str) -> Answered:
  """Scores a prediction; where several boxes are predicted, the first one counts, and where none is, the IoU is 0."""
  asked, answer = (fill_boxes(text, record.text_boxes, coordinates) for text in (question.text, question.answer))
  known = (question.position, record.id, question.task, question.kind, asked, answer, prediction)
  if question.kind == "open":
    return Answered(*known, None)
  if question.kind == "text":
    return Answered(*known, scoring.exact(prediction, answer))
  true = record.text_boxes[int(BOX_PLACEHOLDER.fullmatch(question.answer)[1])]
  predicted = parse_boxes(prediction)[:1]
  score = float(scoring.iou(true[None], predicted)[0]) if len(predicted) else 0.0
  return Answered(*known, score, true, predicted[0] if len(predicted) else None)


def summarise(answered: list[Answered]) -> dict:
  """Scores of texts and boxes, over all and per task."""
  scores = lambda kind, some: [each.score for each in some if each.kind == kind]
  both = lambda some: {"text": scoring.summarise_texts(scores("text", some)),
                       "box": scoring.summarise_boxes(scores("box", some))}
  tasks = sorted({each.task for each in answered if each.kind != "open"})
  return both(answered) | {"tasks": {task: both([each for each in answered if each.task == task]) for task in tasks}}
