"""What a vision-language model knows of unseen scenes: its answers to their questions, by kind of question."""

from lyrics_jax.evaluation.questions import Question, ask, first_questions
from lyrics_jax.inference.generator import Generator
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.study.kinds import kind_of
from lyrics_jax.tasks.scoring import mean
from refiner_export.records.reader import RecordDirectory

_ANSWER_TOKENS = 40  # a box has the most


def scored_questions(directory: RecordDirectory, tasks) -> list[Question]:
  """The questions whose answers can be right or wrong."""
  questions = []
  for question in first_questions(directory, tasks):
    if question.kind != "open":
      questions.append(question)
  return questions


def measure_answers(loaded: LoadedModel, directory: RecordDirectory, batch_size: int) -> dict[str, float]:
  """For each of `kinds.KINDS`, the share of right answers; `rec_iou` is the mean IoU of the boxes."""
  questions = scored_questions(directory, loaded.config.data.rows.tasks)
  right, overlaps = {}, []
  for answer in ask(Generator(loaded, batch_size, _ANSWER_TOKENS), directory, questions):
    right.setdefault(kind_of(answer.task, answer.question), []).append(float(answer.right))
    if answer.kind == "box":
      overlaps.append(answer.score)
  figures = {kind: mean(scores) for kind, scores in right.items()}
  return figures | {"rec_iou": mean(overlaps)}
