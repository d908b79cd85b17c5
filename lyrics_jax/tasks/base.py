"""The base of all tasks: an instruction family, the views that it allows, and how its answers are scored.

Records carry the name of the task and the bare text: the question of a VQA pair, the words of a referring expression,
`<box I.K>` of a region. Exporter, trainer and evaluation meet only in the name of the task.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lyrics_jax.tasks import scoring
from refiner_export.common.boxes import iou
from refiner_export.common.settings import Settings, UserError, require
from refiner_export.records.record import BOX_PLACEHOLDER

Kind = Literal["box", "text", "open"]
Scores = Mapping[Kind, Sequence[float]]

_SIDES = re.compile(r"\b(left|right)|[左右]", re.IGNORECASE)
_COUNTS = re.compile(r"\b(how many|number of|count)\b|[几]|多少", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Utterance:
  """What somebody said. `boxes` are the boxes in the text, float32 (n, 4) xyxy in [0, 1], in order of appearance."""
  text: str
  boxes: np.ndarray


@dataclasses.dataclass(unsafe_hash=True)
class Task(Settings):
  """One instruction family.

  A user's task is a subclass, or a value such as `Task(name="ocr", templates=("Read the text.",))`, in
  `Conversations(tasks=(*TASKS, MyTask()))`.
  """
  name: str = ""  # as records spell it
  # What a user says. {question}, {tag} and {box} all stand for the bare text; the three names say what the text is.
  # Training draws a template, evaluation uses the first one.
  templates: tuple[str, ...] = ("{question}",)
  crop: bool = True  # whether a picture may be cropped
  flip: bool = True  # whether a picture may be mirrored

  def check(self, path):
    require(bool(self.name), f"{path}.name is empty: give the task the name that records have")
    require(bool(self.templates), f"{path}.templates is empty: write at least one, such as {{question}}")
    for template in self.templates:
      try:
        _fill(template, "")
      except (KeyError, IndexError, ValueError):
        raise UserError(f"{path}.templates: {template!r} cannot be filled in: its placeholders are {{question}}, "
                        "{tag} and {box}") from None

  def instructions(self, text: str) -> list[str]:
    """The bare text in every template."""
    return [_fill(template, text) for template in self.templates]

  def instruction(self, text: str, rng: np.random.Generator | None = None) -> str:
    """The user's turn.

    Args:
      text: the bare text; the options of a multiple choice are part of it, as `(a) ... (b) ...`.
      rng: draws the template; None takes the first, as evaluation does.
    """
    index = 0 if rng is None else rng.integers(len(self.templates))
    return _fill(self.templates[index], text)

  def may_crop(self, texts: Sequence[str]) -> bool:
    """Whether the pictures may be cropped. A crop may lose an object, which belies a text that counts."""
    return self.crop and not counts(*texts)

  def may_flip(self, texts: Sequence[str]) -> bool:
    """Whether the pictures may be mirrored. A mirrored picture belies a text that says left or right."""
    return self.flip and not mentions_side(*texts)

  def kind(self, question: str, answer: str) -> Kind:
    """How an answer is scored; the texts are bare, as the record has them.

    "box" for a single box, "text" for words, "open" where there is no question (write a caption). Many answers to an
    open question are right, so none is scored.
    """
    if BOX_PLACEHOLDER.fullmatch(answer):
      return "box"
    return "text" if question else "open"

  def score(self, kind: Kind, prediction: Utterance, answer: Utterance) -> float | None:
    """How good a prediction is: IoU of the first predicted box ("box"), 1.0 or 0.0 ("text"), None ("open").

    A prediction without a box has an IoU of 0.
    """
    if kind == "open":
      return None
    if kind == "text":
      return scoring.exact(prediction.text, answer.text)
    return float(iou(answer.boxes[:1], prediction.boxes[:1])[0]) if len(prediction.boxes) else 0.0

  def is_right(self, kind: Kind, score: float | None) -> bool | None:
    """Whether a score counts as a right answer; None of an open question."""
    if score is None:
      return None
    return score >= (scoring.RIGHT_IOU if kind == "box" else 1)

  def summarise(self, scores: Scores) -> dict[str, dict[str, float | int | None]]:
    """The figures of a report, from the scores of all answers by their kind; a kind may be missing."""
    texts, boxes = scores.get("text", ()), scores.get("box", ())
    return {"text": scoring.summarise_texts(texts), "box": scoring.summarise_boxes(boxes)}


def mentions_side(*texts: str) -> bool:
  """Whether some text says left or right (leftmost, right-hand, ...), so that its picture must not be mirrored."""
  return any(_SIDES.search(text) is not None for text in texts)


def counts(*texts: str) -> bool:
  """Whether some text asks for a number of things, so that its picture must show all of them."""
  return any(_COUNTS.search(text) is not None for text in texts)


def find_task(tasks: Sequence[Task], name: str) -> Task:
  """The task with this name. Raises `UserError` when there is none."""
  for task in tasks:
    if task.name == name:
      return task
  known = ", ".join(task.name for task in tasks)
  raise UserError(f"unknown task {name!r} in a record; known tasks: {known}: add one to config.data.rows.tasks")


def _fill(template: str, text: str) -> str:
  return template.format(question=text, tag=text, box=text)
