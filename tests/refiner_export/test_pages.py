"""Pages and pictures that an evaluation and a plan are shown on. They take plain data: nothing here needs a model."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from test_export_record import picture, record

from refiner_export.common.settings import UserError
from refiner_export.pages import answers, curves, drawing, plan
from refiner_export.pages.answers import AnswerRow

TRUE, PREDICTED = np.array([0.25, 0.5, 0.5, 1]), np.array([0.5, 0.25, 0.25, 0.75])


def boxes_of(page: str) -> list[tuple[bool, list[float]]]:
  """Each rectangle: whether it is dashed, and x, y, width, height."""
  found = re.findall(r'<rect( class="dashed")? x="([^"]*)" y="([^"]*)" width="([^"]*)" height="([^"]*)"', page)
  return [(bool(dashed), [float(number) for number in numbers]) for dashed, *numbers in found]


def test_answers():
  rows = [
      AnswerRow("rec", "the <cat> at <Bbox> (0.1,0.2),(0.3,0.4) </Box>", "there", "here", False, "IoU 0.25", 1, TRUE,
                PREDICTED),
      AnswerRow("vqa", "how many?", "two", "two", True),
      AnswerRow("vqa", "what?", "", "a dog", False),
      AnswerRow("caption", "describe", "a cat", "cats & dogs")]
  page = answers.render("RUN", "some photos", [("mean IoU", "0.25")],
                        [(record(picture(), picture(credit="Photo: Ann")), rows)], records=1234)
  first, second = page.split('<div class="photo">')[1:]
  assert boxes_of(first) == []
  assert sorted(boxes_of(second)) == [(False, [25, 50, 25, 50]), (True, [25, 25, 25, 50])]  # corners are put in order
  plain = " ".join(re.sub("<[^>]*>", " ", page[page.index("<body>"):]).split())
  assert "Answers of RUN" in plain and "about some photos" in plain and "records 1,234" in plain
  assert "mean IoU 0.25" in plain and "Photo: Ann" in plain
  assert "rec 1 the &lt;cat&gt; at (0.1,0.2),(0.3,0.4) there right: here IoU 0.25 &#10007;" in plain
  assert "how many? two &#10003;" in plain and "what? no answer right: a dog &#10007;" in plain
  assert "describe a cat one right answer: cats &amp; dogs not scored" in plain


def test_only_the_first_records_are_read(monkeypatch):
  monkeypatch.setattr(answers, "SHOWN", 2)
  read = []

  def records():
    for k in range(9):
      read.append(k)
      yield record(id=f"photo {k}"), []

  page = answers.render("RUN", "photos", [], records(), records=9)
  assert read == [0, 1] and "photo 1" in page and "the first 2 of 9 records" in page


def test_boxes_are_drawn_over_the_photo():
  file = io.BytesIO()
  Image.new("RGB", (200, 100), "white").save(file, "PNG")
  drawn = drawing.draw_boxes(file.getvalue(), [np.array([[0.5, 0.5, 0.1, 0.1]]), np.zeros((0, 4))], "PNG")
  inked = np.asarray(Image.open(io.BytesIO(drawn))).min(axis=-1) < 255
  rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
  assert np.abs(np.array([rows[0], rows[-1], columns[0], columns[-1]]) - [10, 50, 20, 100]).max() <= 2
  assert not inked[40, 60]  # the inside of a box stays


def test_formats_of_pictures():
  assert drawing.picture_format("x/photo.PNG") == "PNG" and drawing.picture_format("photo.jpg") == "JPEG"
  with pytest.raises(UserError, match="^photo.txt: no picture format has the extension '.txt': name a .png or "):
    drawing.picture_format("photo.txt")


@pytest.mark.parametrize("steps", [[1], [1, 10, 20]])
def test_curves(steps):
  panel = curves.Panel("run", steps, {"itc": [2.0 / step for step in steps], "itm": [1.0] * len(steps)})
  one, two = (Image.open(io.BytesIO(curves.draw([panel] * count))) for count in (1, 2))
  assert one.format == "PNG" and two.width == 2 * one.width and len(one.convert("RGB").getcolors(1 << 24)) > 100


def test_a_plan():
  data = plan.draw("a step", {"weights": 3.0, "activations": 9.0}, 16.0, {"fusions": 30.0, "waiting": 4.0},
                   {"compute": 20.0, "HBM": 10.0, "interconnect": 0.0})
  image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  blue, orange = ((np.abs(image - np.array(colour)) < 9).all(axis=-1) for colour in ((31, 119, 180), (255, 127, 14)))
  memory, time = blue[:len(blue) // 2], blue[len(blue) // 2:]
  assert memory.any() and time.any() and orange.sum() > memory.sum()  # activations take three times the weights
