"""The figure of where the queries look, and the command that draws it."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lyrics_jax.attention import attention
from refiner_export.common.boxes import to_cxcywh
from refiner_export.common.settings import UserError
from refiner_export.pages import attention as figure
from refiner_export.records.reader import RecordDirectory

ROOT = pathlib.Path(__file__).parents[3]


def test_tokens_know_their_objects(exported):
  picture = RecordDirectory(exported)[0].picture
  detection = picture.detection_boxes[:16].copy()
  detection[3] = to_cxcywh(picture.boxes[1:2])[0]
  found = figure.tokens(picture, detection, to_cxcywh(picture.boxes[:4]), np.ones(4, bool))
  rows, marked = found[:16], found[16:]
  assert 1 in [token.object for token in rows] and not any(token.mask for token in rows)
  for token in rows:
    if token.object is not None:
      np.testing.assert_allclose(token.box, picture.boxes[token.object], atol=0.05)
  assert [token.object for token in marked] == [0, 1, 2, 3] and all(token.mask for token in marked)
  np.testing.assert_allclose([token.box for token in marked], picture.boxes[:4], atol=1e-5)


def test_telling_queries():
  weights = np.array([[0.25, 0.25, 0.25, 0.25], [0.9, 0.1, 0, 0], [0.8, 0.2, 0, 0], [0, 0.1, 0.4, 0.5]])
  assert figure.telling_queries(weights) == (1, 3)


def test_coverage_is_the_weight_of_the_boxes_on_a_point():
  boxes = np.array([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
  heat = figure._coverage(np.array([0.2, 0.5, 0.3]), [figure.Token(box, None, False) for box in boxes])
  quarters = heat[::len(heat) - 1, ::len(heat) - 1]
  np.testing.assert_allclose(quarters, [[0.7, 0.2], [0.2, 0.5]], atol=1e-6)


@pytest.mark.parametrize("rows", [0, 20])
def test_the_figure_where_grounding_queries_have_nothing_to_look_at(exported, tmp_path, rows):
  """Either there are no such queries, or all their tokens are padding."""
  picture = RecordDirectory(exported)[1].picture
  tokens = figure.tokens(picture, np.zeros((rows, 4)), np.zeros((0, 4)), np.zeros(0, bool))
  visual = np.full((1, 2, 2, 5), 0.2, np.float32)
  (tmp_path / "attention.png").write_bytes(
      figure.draw(picture, tokens, visual, np.zeros((1, 2, min(rows, 2), rows), np.float32), 2, "$title"))
  with Image.open(tmp_path / "attention.png") as drawn:
    assert drawn.format == "PNG" and drawn.width == 900
    assert len(drawn.convert("RGB").getcolors(1 << 24)) > 1000


def test_the_figure(run, exported, tmp_path, capsys):
  output = tmp_path / "attention.png"
  attention(str(run), f"{exported}#1", str(output))
  assert capsys.readouterr().out == f"attention of camera: {output}\n"
  with Image.open(output) as picture:
    assert picture.format == "PNG" and picture.width == 1800
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
  assert [path.name for path in tmp_path.iterdir()] == ["attention.png"]


@pytest.mark.parametrize("arguments, message", [
    ({"checkpoint": "/nowhere"}, "run not found: /nowhere"),
    ({"record": "records"}, "--record=records: expected DIR#K"),
    ({"record": "/nowhere#0"}, "no manifest.json in /nowhere"),
    ({"output": "picture.jpg"}, "--output=picture.jpg: the figure is a PNG"),
    ({"output": "/nowhere/picture.png"}, "directory of --output not found: /nowhere")])
def test_mistakes(run, exported, arguments, message):
  with pytest.raises(UserError) as raised:
    attention(**{"checkpoint": str(run), "record": f"{exported}#0", "output": "picture.png"} | arguments)
  assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_record_out_of_range(run, exported):
  with pytest.raises(UserError, match=f"#3: {exported} holds records 0 to 2"):
    attention(str(run), f"{exported}#3", "picture.png")


def test_a_mistake_on_the_command_line():
  line = [sys.executable, "-m", "lyrics_jax.attention", "--checkpoint=/nowhere", "--record=records#0", "--output=a.png"]
  result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == 2 and result.stdout == ""
  assert result.stderr.startswith("error: run not found: /nowhere") and result.stderr.count("\n") == 1
