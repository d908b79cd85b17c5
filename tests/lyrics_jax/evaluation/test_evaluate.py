"""What an evaluation writes and says."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from lyrics_jax import evaluate as command
from lyrics_jax.data.spatial import parse_boxes
from lyrics_jax.evaluation import report
from lyrics_jax.evaluation.questions import Answered, first_questions, summarise
from lyrics_jax.evaluation.report import Curves
from lyrics_jax.tasks import TASKS, scoring
from lyrics_jax.training.checkpoint import saved_config
from refiner_export.common.settings import UserError
from refiner_export.pages import curves as curves_page
from refiner_export.records.reader import RecordDirectory

ATTACK = "<script>alert('x')</script>\" onerror=\"y"


class Parrot:
  """Answers every question with the record's own answer, in the place of a model."""
  batch_size = 4

  def __init__(self, loaded):
    self.config = loaded.config

  def answer(self, questions):
    records = [record for record, _ in questions]
    known = {question.text: question for question in first_questions(records, TASKS)}
    return [known[text].answer for _, text in questions]


@pytest.fixture(scope="module")
def evaluated(run, exported, tmp_path_factory):
  output = tmp_path_factory.mktemp("evaluated") / "new" / "folder"
  command.evaluate(str(run), str(exported), str(output))
  return output


def test_the_scores_are_those_of_the_predictions(evaluated, exported):
  directory = RecordDirectory(exported)
  predictions = [json.loads(line) for line in (evaluated / "predictions.jsonl").read_text().splitlines()]
  scores = json.loads((evaluated / "scores.json").read_text())
  assert len(predictions) == len(list(first_questions(directory, TASKS))) > 10
  texts = [each for each in predictions if each["kind"] == "text"]
  boxes = [each for each in predictions if each["kind"] == "box"]
  assert texts and boxes and all(each["score"] is None for each in predictions if each["kind"] == "open")
  assert [each["score"] for each in texts] == [each["prediction"].strip() == each["answer"].strip() for each in texts]
  for each in boxes:
    predicted, (true,) = parse_boxes(each["prediction"]), parse_boxes(each["answer"])
    expected = scoring.iou(predicted[:1], true[None])[0] if len(predicted) else 0
    assert each["score"] == pytest.approx(expected, abs=0.02)  # the written answer is rounded
  assert scores["text"] == scoring.summarise_texts([each["score"] for each in texts])
  assert scores["box"] == scoring.summarise_boxes([each["score"] for each in boxes])
  for task, of_task in scores["tasks"].items():
    assert of_task["text"] == scoring.summarise_texts([each["score"] for each in texts if each["task"] == task])
    assert of_task["box"] == scoring.summarise_boxes([each["score"] for each in boxes if each["task"] == task])
  assert scores["trained_on_these_records"] is True and scores["records"] == 3


def test_the_page_and_the_picture(evaluated):
  page = (evaluated / "answers.html").read_text()
  assert page.count("data:image/jpeg;base64,") == 3 and '="http' not in page and "memorised, not understood" in page
  with Image.open(evaluated / "losses.png") as picture:
    assert picture.format == "PNG" and picture.width > 600
  assert {path.name for path in evaluated.iterdir()} == {
      "answers.html", "losses.png", "predictions.jsonl", "scores.json"}


def test_other_records_and_what_is_printed(run, export_photos, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(command, "Generator", Parrot)
  other = export_photos(1)
  capsys.readouterr()
  command.evaluate(str(run), str(other), str(tmp_path))
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith("run instruct: final loss lm ")
  assert said[1:] == [
      "the records' own questions, about other records than those it was trained on:",
      "text answers: 100 % exactly right, over 5",
      "box answers: mean IoU 0.00, 0 % at IoU >= 0.5, over 9",  # a placeholder is no box
      f"loss curves: {tmp_path}/losses.png", f"answers with predicted boxes: {tmp_path}/answers.html"]
  assert json.loads((tmp_path / "scores.json").read_text())["trained_on_these_records"] is False


def test_another_refiner_is_refused(run, export_photos, tmp_path):
  with pytest.raises(UserError, match="made by refiner"):
    command.evaluate(str(run), str(export_photos(1, grid=3)), str(tmp_path))


def test_the_page_escapes_texts(exported):
  directory = RecordDirectory(exported)
  box = np.array([0.1, 0.2, 0.3, 0.4])
  attack = f"{ATTACK} <Bbox> {ATTACK} </Box>"
  answered = [Answered(0, "name", "vqa", "text", attack, attack, attack + ".", 0.0, False),
              Answered(0, "name", ATTACK, "open", attack, attack, attack + "."),
              Answered(0, "name", "rec", "box", attack, attack, attack, 0.2, False, 0, box, box)]
  page = report.page(directory, answered, summarise(answered, TASKS), False, ATTACK)
  body, own_script = page.split("<script>")  # the page ends with the script which lays the labels out
  assert page.count("&lt;script&gt;") > 15 and 'onerror="' not in page
  assert "<script" not in body and "name" not in own_script.split("</script>")[1]


def test_corners_in_the_wrong_order_are_drawn(exported):
  directory = RecordDirectory(exported)
  true, predicted = np.array([0, 0, 1, 1]), np.array([0.75, 0.5, 0.25, 1])
  answered = Answered(0, "name", "rec", "box", "?", "!", "!", 0.0, False, 0, true, predicted)
  page = report.page(directory, [answered], summarise([answered], TASKS), False, "run")
  assert '<rect class="dashed" x="25.0" y="50.0" width="50.0" height="50.0"' in page


def test_final_losses_in_words():
  align = Curves("align", ("itc", "itm"), [{"step": 1, "itc": 2.0, "itm": 1.0}, {"step": 2, "itc": 0.0123, "itm": 0.2}])
  instruct = Curves("instruct", ("lm",), [{"step": 1, "lm": 0.7, "token_accuracy": 0.5}])
  assert list(report.lines(summarise([], TASKS), [align, instruct], True))[:2] == [
      "run align: final losses itc 0.012, itm 0.2", "run instruct: final loss lm 0.7"]
  one, two = (Image.open(io.BytesIO(curves_page.draw(panels))).width for panels in (
      [align.panel], [align.panel, instruct.panel]))
  assert two == 2 * one


def test_curves_of_a_run_and_of_the_run_before(run, tmp_path):
  config = saved_config(str(run))
  before, after = tmp_path / "before", tmp_path / "after"
  for folder, init_from in ((before, ""), (after, str(before))):
    folder.mkdir()
    (folder / "config.json").write_text(dataclasses.replace(config, output=str(folder), init_from=init_from).to_json())
    lines = [json.dumps({"step": step, "lm": 0.7, "loss": 1.0}) for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  both = report.read_curves(str(after))
  assert [(curves.run, curves.objectives, len(curves.entries)) for curves in both] == [
      ("before", ("lm",), 3), ("after", ("lm",), 3)]
  (before / "metrics.jsonl").unlink()
  assert len(report.read_curves(str(after))) == 1  # it began from published weights, which have no losses
  before.rename(tmp_path / "elsewhere")
  assert len(report.read_curves(str(after))) == 1  # the run before may lie on another machine
  (after / "metrics.jsonl").unlink()
  with pytest.raises(UserError, match=f"no metrics.jsonl in {after}"):
    report.read_curves(str(after))
