"""Scores against counting by hand, and which answer is scored in which way."""

import numpy as np
import pytest

from lyrics_jax.data.spatial import format_box
from lyrics_jax.evaluation import scoring
from lyrics_jax.evaluation.questions import first_questions, judge, summarise


def test_iou_counts_pixels():
  rng = np.random.default_rng(0)
  corners = np.sort(rng.integers(0, 21, (2, 300, 2, 2)), axis=2)  # boxes without area are among them
  a, b = corners.reshape(2, 300, 4)

  def painted(box):
    canvas = np.zeros((20, 20), bool)
    canvas[box[1]:box[3], box[0]:box[2]] = True
    return canvas

  expected = []
  for first, second in zip(a, b):
    first, second = painted(first), painted(second)
    expected.append((first & second).sum() / max((first | second).sum(), 1))
  assert 0 in expected and max(expected) > 0.5
  np.testing.assert_allclose(scoring.iou(a / 20, b / 20), expected, atol=1e-12)
  np.testing.assert_allclose(scoring.iou(b / 20, a / 20), expected, atol=1e-12)


def test_iou_of_equal_wrong_and_no_boxes():
  box = np.array([[0.1, 0.2, 0.5, 0.9]], np.float32)
  assert scoring.iou(box, box) == pytest.approx([1])
  assert scoring.iou(box, box[:, [2, 3, 0, 1]]) == [0]  # corners in the wrong order
  assert scoring.iou(box[:, [2, 3, 0, 1]], box[:, [2, 3, 0, 1]]) == [0]
  assert scoring.iou(np.zeros((1, 4)), np.zeros((1, 4))) == [0]
  assert scoring.iou(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)


def test_exact():
  assert scoring.exact(" two \n", "two") == 1
  assert scoring.exact("Two", "two") == scoring.exact("two cats", "two") == scoring.exact("", "two") == 0


def test_summaries():
  assert scoring.summarise_texts([1, 0, 0, 1]) == {"count": 4, "exact": 0.5}
  assert scoring.summarise_boxes([0.5, 0.25, 1, 0.25]) == {"count": 4, "mean_iou": 0.5, "found": 0.5}
  assert scoring.summarise_texts([]) == {"count": 0, "exact": None}
  assert scoring.summarise_boxes([]) == {"count": 0, "mean_iou": None, "found": None}


def test_first_questions_and_kinds(records):
  questions = list(first_questions(records[:1]))
  assert [(question.task, question.kind) for question in questions] == [
      ("vqa", "text"), ("rec", "box"), ("region", "text"), ("caption", "open"), ("text_vqa", "text"),
      ("grounded_caption", "open"), ("multiple_choice", "text"), ("dialogue", "text")]
  assert questions[1].text == "Where is the red ball? Give its box." and questions[1].answer == "<box 0>"
  assert questions[-1].text == "Who sits on the left?"  # the first of three


def test_judging(records):
  record = records[0]
  ask = {question.task: question for question in first_questions(records)}
  assert judge(ask["vqa"], record, "two", "decimal").right is True
  assert judge(ask["vqa"], record, "three", "decimal").right is False
  assert judge(ask["caption"], record, "A cat plays with a ball.", "decimal").right is None
  written = f"<Bbox> {format_box(record.text_boxes[0], 'decimal')} </Box>"
  found = judge(ask["rec"], record, f"{written} and {format_box([0, 0, 1, 1], 'decimal')}", "decimal")
  assert found.answer == written and found.score > 0.97 and found.right  # the first box counts; three decimals are kept
  for nothing in ("over there", "", "(0.1,0.2)"):
    lost = judge(ask["rec"], record, nothing, "decimal")
    assert lost.score == 0 and lost.right is False and lost.predicted_box is None
  region = judge(ask["region"], record, "a red ball on the floor", "decimal")
  assert written in region.question and region.score == 1 and region.true_box is None


def test_summary_leaves_open_questions_out(records):
  answers = [judge(question, records[question.position], "two", "decimal") for question in first_questions(records[:2])]
  summary = summarise(answers)
  assert summary["text"] == {"count": 10, "exact": 0.2} and summary["box"] == {"count": 2, "mean_iou": 0, "found": 0}
  assert set(summary["tasks"]) == {"vqa", "rec", "region", "text_vqa", "multiple_choice", "dialogue"}
  assert summary["tasks"]["vqa"] == {"text": {"count": 2, "exact": 1}, "box": scoring.summarise_boxes([])}
