"""Which questions are asked, and which answer is scored in which way."""

import dataclasses

import numpy as np
import pytest

from lyrics_jax.data.spatial import format_box
from lyrics_jax.evaluation.questions import Question, first_questions, judge, summarise
from lyrics_jax.tasks import TASKS, Task, scoring


def test_first_questions_and_kinds(records):
  questions = list(first_questions(records[:1], TASKS))
  assert [(question.task, question.kind) for question in questions] == [
      ("vqa", "text"), ("rec", "box"), ("region", "text"), ("caption", "open"), ("text_vqa", "text"),
      ("grounded_caption", "open"), ("multiple_choice", "text"), ("dialogue", "text")]
  assert questions[1].text == "Where is the red ball? Give its box." and questions[1].answer == "<box 0.0>"
  assert questions[-1].text == "Who sits on the left?"  # the first of three


def test_a_caption_is_asked_for_once(records):
  """Also where the record has captions alone, and no conversation of task caption."""
  without = [conversation for conversation in records[0].conversations if conversation.task != "caption"]
  record = dataclasses.replace(records[0], conversations=tuple(without))
  captions = [question for question in first_questions([record], TASKS) if question.task == "caption"]
  assert len(record.captions) > 1 and [question.answer for question in captions] == [record.captions[0]]


def test_judging(records):
  record = records[0]
  box = record.pictures[0].text_boxes[0]
  ask = {question.task: question for question in first_questions(records[:1], TASKS)}

  def judged(task, prediction):
    return judge(ask[task], record, prediction, TASKS, "decimal")

  assert judged("vqa", "two").right is True
  assert judged("vqa", "three").right is False
  assert judged("caption", "A cat plays with a ball.").right is None
  written = f"<Bbox> {format_box(box, 'decimal')} </Box>"
  found = judged("rec", f"{written} and {format_box([0, 0, 1, 1], 'decimal')}")
  assert found.answer == written and found.score > 0.97 and found.right  # the first box counts; three decimals are kept
  assert found.picture == 0
  np.testing.assert_array_equal(found.true_box, box)
  for nothing in ("over there", "", "(0.1,0.2)"):
    lost = judged("rec", nothing)
    assert lost.score == 0 and lost.right is False and lost.predicted_box is None
  region = judged("region", "a red ball on the floor")
  assert written in region.question and region.score == 1 and region.true_box is None


def test_a_box_in_the_second_picture(records):
  pictures = records[0].pictures + records[1].pictures
  record = dataclasses.replace(records[0], pictures=pictures)
  question = Question(0, "rec", "Where is the dog?", "<box 1.1>", "box")
  box = pictures[1].text_boxes[1]
  found = judge(question, record, f"<Bbox> {format_box(box, 'decimal')} </Box>", TASKS, "decimal")
  assert found.right and found.picture == 1
  np.testing.assert_array_equal(found.true_box, box)


def test_summary_leaves_open_questions_out(records):
  answers = []
  for question in first_questions(records[:2], TASKS):
    answers.append(judge(question, records[question.position], "two", TASKS, "decimal"))
  summary = summarise(answers, TASKS)
  assert summary["text"] == {"count": 10, "exact": 0.2} and summary["box"] == {"count": 2, "mean_iou": 0, "found": 0}
  assert set(summary["tasks"]) == {"vqa", "rec", "region", "text_vqa", "multiple_choice", "dialogue"}
  assert summary["tasks"]["vqa"] == {"text": {"count": 2, "exact": 1}, "box": scoring.summarise_boxes([])}


class Lenient(Task):
  """Half a point for every answer, whatever it is."""

  def score(self, kind, prediction, answer):
    return 0.5

  def summarise(self, scores):
    return {"points": sum(scores["text"])}


def test_a_task_scores_and_sums_up_its_answers(records):
  tasks = (Lenient(name="vqa"), *[task for task in TASKS if task.name != "vqa"])
  question = next(first_questions(records[:1], tasks))
  answer = judge(question, records[0], "anything", tasks, "decimal")
  assert answer.score == 0.5 and answer.right is False
  assert summarise([answer, answer], tasks)["tasks"] == {"vqa": {"points": pytest.approx(1)}}
