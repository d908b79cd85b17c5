"""The kinds of questions that scenes bring along, told by their words, and what one gets right without looking."""

import collections
import re
from collections.abc import Sequence

from lyrics_jax.evaluation.questions import Question
from refiner_export.common.settings import UserError

KINDS = ("rec", "count", "colour", "shape", "relation", "presence", "region")

_WORDS = (("count", "how many"), ("colour", "what colour"), ("shape", "what shape"), ("presence", "is there"),
          ("relation", "is the"))


def kind_of(task: str, question: str) -> str:
  """One of `KINDS`; `question` is in a template of its task. Raises `UserError` for a question that is of none."""
  if task in KINDS:
    return task
  for kind, words in _WORDS:
    if re.search(rf"\b{words}\b", question.lower()):
      return kind
  raise UserError(f"the question {question!r} of task {task!r} is of no kind that the study knows: {', '.join(KINDS)}")


def commonest(questions: Sequence[Question]) -> dict[str, float]:
  """For each kind of question with words for an answer, the share of its commonest answer."""
  answers = collections.defaultdict(collections.Counter)
  for question in questions:
    if question.kind == "text":
      answers[kind_of(question.task, question.text)][question.answer] += 1
  shares = {}
  for kind, counts in answers.items():
    shares[kind] = counts.most_common(1)[0][1] / counts.total()
  return shares
