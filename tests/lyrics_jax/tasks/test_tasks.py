import dataclasses

import numpy as np
import pytest

from lyrics_jax.data.spatial import parse_boxes
from lyrics_jax.tasks import TASKS, Task, Utterance, default_tasks, find_task, mentions_side
from refiner_export.common.settings import UserError

NO_BOXES = np.zeros((0, 4), np.float32)
BOX = np.array([[0.1, 0.2, 0.5, 0.6]], np.float32)


def said(text: str) -> Utterance:
  return Utterance(text, parse_boxes(text))


def task(name: str) -> Task:
  return find_task(TASKS, name)


def test_the_families_of_the_paper():
  assert [one.name for one in TASKS] == [
      "caption", "vqa", "text_vqa", "grounded_caption", "rec", "region", "multiple_choice", "dialogue"]
  with pytest.raises(UserError, match="^unknown task 'ocr' in a record; known tasks: caption, vqa, .*: add one"):
    task("ocr")


def test_instructions():
  assert task("vqa").instruction("How many?") == "How many?"
  assert task("rec").instruction("the cat {left}") == "Where is the cat {left}? Give its box."
  assert task("dialogue").instruction("Hi", np.random.default_rng(0)) == "Hi"
  rng = np.random.default_rng(0)
  for one in TASKS:
    heard = {one.instruction("<box 0.0>", rng) for _ in range(100)}
    assert heard == set(one.instructions("<box 0.0>")) and len(heard) == len(one.templates)
    assert all("<box 0.0>" in text for text in heard) or one.name in ("caption", "grounded_caption")
    assert not mentions_side(*one.templates)  # or no picture of the task would ever be mirrored


def test_which_views_a_task_allows():
  assert task("vqa").may_flip(["How many?", "two"]) and task("vqa").may_crop(["What is this?", "a cat"])
  for text in ("How many cats are there?", "The number of cats?", "Count the cats.", "有多少只猫？"):
    assert not task("vqa").may_crop([text, "two"]) and not task("multiple_choice").may_crop([text, "(a) two"])
  assert task("vqa").may_crop(["Which country is this?", "Peru"])
  assert not task("text_vqa").may_crop(["What does the sign say?", "STOP"])
  assert not task("dialogue").may_flip(["Who sits there?", "The man on the left."])
  assert not task("text_vqa").may_flip(["What does the sign say?", "STOP"])
  assert not Task(name="map", crop=False).may_crop(["Where?"])


@pytest.mark.parametrize("text, expected", [
    ("The LEFT cat", True), ("rightmost man", True), ("right-hand side", True), ("左边的猫", True),
    ("a bright day", False), ("a copyleft sign", False), ("a cat", False)])
def test_mentions_side(text, expected):
  assert mentions_side(text) == expected and mentions_side("a dog", text) == expected


@pytest.mark.parametrize("question, answer, kind", [
    ("the red ball", "<box 0.3>", "box"), ("", "<box 1.0>", "box"), ("How many?", "two", "text"),
    ("Where?", "At <box 0.1>.", "text"), ("", "A cat.", "open")])
def test_kinds(question, answer, kind):
  assert all(one.kind(question, answer) == kind for one in TASKS)


def test_scores_of_texts():
  vqa, answer = task("vqa"), Utterance("two", NO_BOXES)
  assert vqa.score("text", said(" two\n"), answer) == 1 and vqa.is_right("text", 1.0) is True
  assert vqa.score("text", said("three"), answer) == 0 and vqa.is_right("text", 0.0) is False
  assert vqa.score("open", said("A cat."), answer) is None and vqa.is_right("open", None) is None


def test_scores_of_boxes():
  """The first predicted box counts; the answer's box is the true one, not as it is written."""
  rec, answer = task("rec"), Utterance("<Bbox> (0.100,0.200),(0.500,0.600) </Box>", BOX)
  first, second = "(0.100,0.200),(0.300,0.600)", "(0.100,0.200),(0.500,0.600)"
  assert rec.score("box", said(second), answer) == pytest.approx(1)
  half = rec.score("box", said(f"{first} and {second}"), answer)
  assert half == pytest.approx(0.5, abs=1e-6)
  assert rec.is_right("box", 0.5) is True and rec.is_right("box", 0.49) is False
  for nothing in ("over there", "", "(0.1,0.2)"):
    assert rec.score("box", said(nothing), answer) == 0


def test_summaries():
  one = Task(name="any")
  assert one.summarise({"text": [1, 0, 0, 1], "box": [0.5, 0.25, 1, 0.25]}) == {
      "text": {"count": 4, "exact": 0.5}, "box": {"count": 4, "mean_iou": 0.5, "found": 0.5}}
  assert one.summarise({})["box"] == {"count": 0, "mean_iou": None, "found": None}


def test_a_task_of_a_user():
  """A task that counts answers right when they hold the true one, and never crops."""

  @dataclasses.dataclass(unsafe_hash=True)
  class Counting(Task):
    name: str = "counting"
    templates: tuple[str, ...] = ("How many {tag} are there?",)
    crop: bool = False

    def score(self, kind, prediction, answer):
      return float(answer.text in prediction.text)

  tasks = (*TASKS, Counting())
  mine = find_task(tasks, "counting")
  mine.finalize("config.data.rows.tasks[8]")
  assert mine.instruction("cats") == "How many cats are there?" and not mine.may_crop(["cats", "2"])
  assert mine.score("text", said("I see 2 cats"), said("2")) == 1


def test_impossible_tasks_name_the_field():
  for wrong, message in (
      (Task(), r"^tasks\[0\]\.name is empty"), (Task(name="a", templates=()), "templates is empty"),
      (Task(name="a", templates=("{word}",)), r"\{word\}' cannot be filled in: its placeholders are \{question\}"),
      (Task(name="a", templates=("{",)), "cannot be filled in")):
    with pytest.raises(UserError, match=message):
      wrong.finalize("tasks[0]")


def test_two_configurations_share_no_task():
  for one, other in zip(default_tasks(), default_tasks(), strict=True):
    assert one == other and one is not other
