"""The questions that records bring along: the first question of each conversation, with its answer."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from lyrics_jax.config import Config
from lyrics_jax.data.errors import about
from lyrics_jax.data.rows import Records
from lyrics_jax.data.spatial import fill_boxes, parse_boxes, referred_boxes
from lyrics_jax.inference.generator import Generator
from lyrics_jax.inference.loaded import LoadedModel, require_model
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.tasks import Task, Utterance, find_task
from lyrics_jax.tasks.scoring import summarise_boxes, summarise_texts
from lyrics_jax.training.evaluations import EvaluationSettings
from refiner_export.common.checks import at_least
from refiner_export.common.progress import chunks
from refiner_export.common.settings import require
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import CAPTION, Record, conversation_items


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about the record at `position`, in the first template of its task. Texts may hold `<box I.K>`.

  `kind` is how the answer is scored, see `Task.kind`.
  """
  position: int
  task: str
  text: str
  answer: str
  kind: str


@dataclasses.dataclass(frozen=True)
class Answered:
  """A question with the answer of the model. `score` and `right` are those of the task, None of an open question.

  `record` is the name of the record at `position`. In `question` and `answer` boxes are written out, as the model reads
  and writes them. `true_box` and `predicted_box` are (4,) xyxy in [0, 1] of the record's picture number `picture`; only
  box answers have them.
  """
  position: int
  record: str
  task: str
  kind: str
  question: str
  answer: str
  prediction: str
  score: float | None = None
  right: bool | None = None
  picture: int = 0
  true_box: np.ndarray | None = None
  predicted_box: np.ndarray | None = None


def first_questions(records: Records, tasks: Sequence[Task]) -> Iterator[Question]:
  """Reads all records once, in order. A record with several captions is asked for a caption once."""
  for position in range(len(records)):
    record = records[position]
    captioned = False
    for conversation in conversation_items(record):
      if conversation.task == CAPTION and captioned:
        continue
      captioned |= conversation.task == CAPTION
      asked, answer = conversation.turns[0].text.strip(), conversation.turns[1].text.strip()
      with about(record):
        task = find_task(tasks, conversation.task)
        yield Question(position, task.name, task.instruction(asked), answer, task.kind(asked, answer))


def ask(generator: Generator, records: Records, questions: Sequence[Question]) -> list[Answered]:
  """Has the model answer the questions, and scores the answers."""
  tasks, coordinates = generator.config.data.rows.tasks, generator.config.data.coordinates
  answered = []
  for chunk in chunks(questions, generator.batch_size, "question"):
    asked = []
    for question in chunk:
      asked.append((records[question.position], question.text))
    for question, (record, _), prediction in zip(chunk, asked, generator.answer(asked)):
      answered.append(judge(question, record, prediction, tasks, coordinates))
  return answered


def judge(question: Question, record: Record, prediction: str, tasks: Sequence[Task], coordinates: str) -> Answered:
  """Scores a prediction by the question's task."""
  boxes = [picture.text_boxes for picture in record.pictures]
  asked = fill_boxes(question.text, boxes, coordinates)
  answer = fill_boxes(question.answer, boxes, coordinates)
  referred = referred_boxes(question.answer)
  true = np.array([boxes[picture][box] for picture, box in referred], np.float32).reshape(-1, 4)
  predicted = parse_boxes(prediction)
  task = find_task(tasks, question.task)
  score = task.score(question.kind, Utterance(prediction, predicted), Utterance(answer, true))
  answered = Answered(question.position, record.id, question.task, question.kind, asked, answer, prediction, score,
                      task.is_right(question.kind, score))
  if question.kind != "box" or not referred:
    return answered
  return dataclasses.replace(answered, picture=referred[0][0], true_box=true[0],
                             predicted_box=predicted[0] if len(predicted) else None)


def summarise(answered: Iterable[Answered], tasks: Sequence[Task]) -> dict:
  """Scores of texts and boxes over all questions, and for each task the figures of `Task.summarise`."""
  overall, by_task = {"text": [], "box": []}, {}
  for answer in answered:
    if answer.score is not None:
      of_task = by_task.setdefault(answer.task, {})
      of_task.setdefault(answer.kind, []).append(answer.score)
      overall.setdefault(answer.kind, []).append(answer.score)
  of_tasks = {}
  for name in sorted(by_task):
    of_tasks[name] = find_task(tasks, name).summarise(by_task[name])
  return {"text": summarise_texts(overall["text"]), "box": summarise_boxes(overall["box"]), "tasks": of_tasks}


@dataclasses.dataclass(unsafe_hash=True)
class Answers(EvaluationSettings):
  """Answers to the questions of held-out records while a vision-language model trains.

  The figures are `answers/exact`, the share of texts that are exactly right, and `answers/mean_iou` and `answers/found`
  of boxes.
  """
  name = "answers"
  records: str = ""  # directory of held-out records
  most: int = 1000  # questions that are asked, the first ones of the directory
  batch_size: int = 8
  max_new_tokens: int = 96

  def check(self, path: str) -> None:
    super().check(path)
    require(bool(self.records), f"{path}.records is empty: name a directory that refiner_export wrote")
    at_least(self, path, 1, "most", "batch_size", "max_new_tokens")

  def check_run(self, config: Config, path: str) -> None:
    super().check_run(config, path)
    require_model(config, VLMSettings, path)

  def build(self, config: Config, fingerprint: str) -> Callable[[LoadedModel], dict[str, float]]:
    records = RecordDirectory(self.records, fingerprint)
    tasks = config.data.rows.tasks
    questions = list(itertools.islice(first_questions(records, tasks), self.most))
    require(bool(questions), f"{self.records}: no record has a question, so there is nothing to ask")

    @functools.lru_cache(maxsize=1)
    def generator_of(loaded: LoadedModel) -> Generator:  # its program is compiled once for the whole training
      return Generator(loaded, self.batch_size, self.max_new_tokens)

    def measure(loaded: LoadedModel) -> dict[str, float]:
      summary = summarise(ask(generator_of(loaded), records, questions), tasks)
      text, box, figures = summary["text"], summary["box"], {}
      if text["count"]:
        figures["exact"] = text["exact"]
      if box["count"]:
        figures |= {"mean_iou": box["mean_iou"], "found": box["found"]}
      return figures

    return measure


def read_record(name: str, fingerprint: str) -> Record:
  """The record `DIR#K` of a command line, K counted from 0. The refiner `fingerprint` must have made it.

  Raises:
    UserError: the name is malformed, or there is no such record.
  """
  path, _, position = name.rpartition("#")
  require(bool(path) and position.isdecimal(), f"--record={name}: expected DIR#K, for example records#0")
  directory = RecordDirectory(path, fingerprint)
  require(int(position) < len(directory), f"--record={name}: {path} holds records 0 to {len(directory) - 1}")
  return directory[int(position)]
