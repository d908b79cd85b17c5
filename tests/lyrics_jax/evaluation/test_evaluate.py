"""What an evaluation writes and says."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from lyrics_jax import evaluate as command
from lyrics_jax.data.spatial import parse_boxes
from lyrics_jax.evaluation import curves, report, scoring
from lyrics_jax.evaluation.questions import Answered, first_questions, summarise
from lyrics_jax.training.checkpoint import saved_config
from refiner_export.records.reader import RecordDirectory
from refiner_export.common.settings import UserError

ATTACK = "<script>alert('x')</script>\" onerror=\"y"


class Parrot:
  """Answers every question with the record's own answer, in the place of a model."""
  batch_size = 4

  def __init__(self, checkpoint):
    self.config = saved_config(checkpoint)

  def answer(self, questions):
    known = {question.text: question for question in first_questions([record for record, _ in questions])}
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
  assert len(predictions) == sum(len(directory[k].conversations) for k in range(3))
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
  assert sorted(path.name for path in evaluated.iterdir()) == ["answers.html", "losses.png", "predictions.jsonl", "scores.json"]


def test_other_records_and_what_is_printed(run, export_photos, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(command, "Answerer", Parrot)
  other = export_photos(1)
  capsys.readouterr()
  command.evaluate(str(run), str(other), str(tmp_path))
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith("stage instruct: final loss lm ")
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
  answered = [Answered(0, "name", "vqa", "text", attack, attack, attack + ".", 0.0),
              Answered(0, "name", ATTACK, "open", attack, attack, attack + ".", None),
              Answered(0, "name", "rec", "box", attack, attack, attack, 0.2, box, box)]
  page = report.render(directory, answered, summarise(answered), False, ATTACK)
  assert page.count("&lt;script&gt;") > 15 and "<script" not in page and 'onerror="' not in page


def test_corners_in_the_wrong_order_are_drawn(exported):
  directory = RecordDirectory(exported)
  answered = Answered(0, "name", "rec", "box", "?", "!", "!", 0.0, np.array([0, 0, 1, 1]), np.array([0.75, 0.5, 0.25, 1]))
  page = report.render(directory, [answered], summarise([answered]), False, "run")
  assert '<rect class="dashed" x="25.0" y="50.0" width="50.0" height="50.0"' in page


def test_curves_of_both_stages(run, tmp_path):
  config = saved_config(str(run))
  align, instruct = tmp_path / "align", tmp_path / "instruct"
  entry = {"loss": 1.0, "itc": 0.012345, "itm": 0.2, "icg": 3.0, "msp": 0.5, "lm": 0.7}
  for folder, changes in ((align, {"stage": "align"}), (instruct, {"init_from": str(align)})):
    folder.mkdir()
    (folder / "config.json").write_text(dataclasses.replace(config, output=str(folder), **changes).to_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **entry}) + "\n" for step in (1, 2, 3)))
  both = curves.read_curves(str(instruct))
  assert [(each.stage, len(each.entries)) for each in both] == [("align", 3), ("instruct", 3)]
  assert list(report.lines(summarise([]), both, True))[:2] == [
      "stage align: final losses itc 0.012, itm 0.2, icg 3, msp 0.5", "stage instruct: final loss lm 0.7"]
  widths = [Image.open(io.BytesIO(curves.draw(some))).width for some in (both[:1], both)]
  assert widths[1] == 2 * widths[0]
  (align / "metrics.jsonl").unlink()
  assert len(curves.read_curves(str(instruct))) == 1  # it began from published weights, which have no losses
  align.rename(tmp_path / "elsewhere")
  assert len(curves.read_curves(str(instruct))) == 1  # the run before may lie on another machine
  (instruct / "metrics.jsonl").unlink()
  with pytest.raises(UserError, match=f"no metrics.jsonl in {instruct}"):
    curves.read_curves(str(instruct))
