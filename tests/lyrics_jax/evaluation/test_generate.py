"""Prompts about records and photos, and what is said about mistakes."""

import io
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lyrics_jax import generate as command
from lyrics_jax.generate import generate
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common.settings import UserError
from refiner_export.pages.drawing import draw_boxes
from refiner_export.records.reader import RecordDirectory

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def photo(exported, tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("photo") / "photo.jpg"
  path.write_bytes(RecordDirectory(exported)[0].picture.image)
  return str(path)


@pytest.fixture
def far_away(run, tmp_path) -> pathlib.Path:
  """The run on a machine without its records."""
  copy = shutil.copytree(run, tmp_path / "far away")
  config = json.loads((copy / "config.json").read_text())
  config["data"]["records"] = "/gone"
  (copy / "config.json").write_text(json.dumps(config))
  return copy


def test_a_record_several_prompts(run, exported, capsys):
  answers = generate(str(run), ["What is this?", "Where is <box 0>?"], record=f"{exported}#2")
  assert len(answers) == 2
  assert capsys.readouterr().out == (
      f"What is this?\n  {answers[0] or '(no answer)'}\nWhere is <box 0>?\n  {answers[1] or '(no answer)'}\n")


def test_boxes_of_the_only_picture(run, exported):
  """`<box K>` is short for `<box 0.K>`."""
  short, long = generate(str(run), ["Where is <box 1>?", "Where is <box 0.1>?"], record=f"{exported}#2")
  assert short == long


def test_on_a_mesh(run, exported):
  prompts = ["What is this?", "Where is <box 0>?"]
  assert generate(str(run), prompts, f"{exported}#2", mesh="2,2,2") == generate(str(run), prompts, f"{exported}#2")


def test_a_photo_without_the_records(far_away, photo):
  (answer,) = generate(str(far_away), ["What is this?"], image=photo)
  assert isinstance(answer, str)


def test_the_manifest_of_a_run(run, far_away, exported):
  manifest = RecordDirectory(exported).manifest
  assert trained_manifest(str(far_away), saved_config(str(far_away))) == manifest
  (far_away / "manifest.json").unlink()
  with pytest.raises(UserError, match="no manifest.json in /gone"):
    trained_manifest(str(far_away), saved_config(str(far_away)))
  assert trained_manifest(str(far_away), saved_config(str(run))) == manifest  # the records are still there


def test_boxes_of_answers_are_drawn(run, exported, tmp_path, monkeypatch, capsys):

  class Pointer:
    """Points at the upper left quarter, in the place of a model."""

    def __init__(self, loaded, batch_size):
      pass

    def answer(self, questions):
      return ["at <Bbox> (0.000,0.000),(0.500,0.500) </Box>", "nowhere"][:len(questions)]

  monkeypatch.setattr(command, "Generator", Pointer)
  output = tmp_path / "picture.png"
  generate(str(run), ["Where?", "Where else?"], record=f"{exported}#0", output=str(output))
  assert capsys.readouterr().out.endswith(f"1 boxes drawn: {output}\n")
  picture = RecordDirectory(exported)[0].picture
  before = np.asarray(Image.open(io.BytesIO(picture.image)).convert("RGB"))
  after = np.asarray(Image.open(output).convert("RGB"))
  changed = (before != after).any(axis=2)
  middle = picture.width // 2
  assert changed[:middle, middle - 2].all()  # the right edge of the box
  assert not changed[:, middle + 2:].any()


@pytest.mark.parametrize("boxes", [np.zeros((0, 4)), np.array([[0.9, 0.9, 0.1, 0.1], [0, 0, 0, 0], [1, 1, 1, 1]])])
def test_any_box_can_be_drawn(exported, boxes):
  picture = draw_boxes(RecordDirectory(exported)[0].picture.image, [boxes.astype(np.float32)], "JPEG")
  assert Image.open(io.BytesIO(picture)).format == "JPEG"


@pytest.mark.parametrize("arguments, message", [
    ({"checkpoint": "/nowhere"}, "run not found: /nowhere"),
    ({"prompt": []}, "--prompt is required"),
    ({"prompt": ["What?", " "]}, "--prompt is required"),
    ({"record": None}, "either --record DIR#K or --image photo.jpg"),
    ({"image": "photo.jpg"}, "either --record DIR#K or --image photo.jpg"),
    ({"record": "records"}, "--record=records: expected DIR#K"),
    ({"record": "#1"}, "--record=#1: expected DIR#K"),
    ({"record": "records#-1"}, "--record=records#-1: expected DIR#K"),
    ({"record": "/nowhere#0"}, "no manifest.json in /nowhere"),
    ({"record": None, "image": "/no.jpg"}, "--image not found: /no.jpg"),
    ({"record": None, "image": "/tmp"}, "--image=/tmp is a directory"),
    ({"record": None, "image": __file__}, f"--image={__file__} cannot be read: not a picture"),
    ({"output": "picture.txt"}, "picture.txt: no picture format has the extension '.txt'"),
    ({"output": "/nowhere/picture.png"}, "directory of --output not found: /nowhere"),
    ({"prompt": ["Where is <box 99>?"]}, "refers to <box 0.99>"),
    ({"prompt": ["long " * 200]}, "there is room for 96")])
def test_mistakes(run, exported, arguments, message):
  with pytest.raises(UserError) as raised:
    generate(**{"checkpoint": str(run), "prompt": ["What?"], "record": f"{exported}#0"} | arguments)
  assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_record_out_of_range(run, exported):
  with pytest.raises(UserError, match=f"#3: {exported} holds records 0 to 2"):
    generate(str(run), ["What?"], record=f"{exported}#3")


def test_a_run_without_checkpoint(run, exported, tmp_path):
  for name in ("config.json", "manifest.json"):
    shutil.copy(run / name, tmp_path / name)
  with pytest.raises(UserError, match="no checkpoint in"):
    generate(str(tmp_path), ["What?"], record=f"{exported}#0")


@pytest.mark.parametrize("arguments, message", [
    (["generate", "--checkpoint=/nowhere", "--record=records#0", "--prompt=What?"], "run not found: /nowhere. Name"),
    (["generate", "--promt=What?"], "unknown flag --promt (did you mean --prompt?)"),
    (["evaluate", "--checkpoint=/nowhere", "--records=records"], "--output is required")])
def test_mistakes_on_the_command_line(arguments, message):
  line = [sys.executable, "-m", f"lyrics_jax.{arguments[0]}", *arguments[1:]]
  result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == 2 and result.stdout == ""
  assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
