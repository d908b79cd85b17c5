import numpy as np
import pytest

from lyrics_jax.data.spatial import (
    SPECIAL_TOKENS, fill_boxes, format_box, format_object, parse_boxes, referred_boxes, referred_pictures,
    renumber_pictures, without_pictures)
from refiner_export.common.settings import UserError

BOX = (0.125, 0.0, 1.0, 0.5004)


def test_written_form():
  assert format_object("fire hydrant", BOX, "decimal") == (
      "<br><T> fire hydrant </T><Bbox> (0.125,0.000),(1.000,0.500) </Box></br>")
  assert format_object("cat", BOX, "integer") == "<br><T> cat </T><Bbox> (125,0),(999,500) </Box></br>"
  assert format_box((-0.0, -1e-9, 1.2, 0.9996), "decimal") == "(0.000,0.000),(1.000,1.000)"
  assert all(format_object("cat", BOX, "decimal").count(token) == 1 for token in SPECIAL_TOKENS)


@pytest.mark.parametrize("coordinates", ["decimal", "integer"])
def test_boxes_are_read_back(coordinates):
  boxes = np.random.default_rng(0).random((50, 4), np.float32)
  text = "".join(format_object("cat", box, coordinates) for box in boxes)
  np.testing.assert_allclose(parse_boxes(text), boxes, atol=1.01e-3 if coordinates == "integer" else 5.1e-4)


def test_malformed_boxes_are_left_out():
  assert parse_boxes("no box").shape == (0, 4) and parse_boxes("").dtype == np.float32
  text = "(0.1,0.2),(0.3 <Bbox> ( .1 , 0.2 ) , (0.3,0.4) </Box> (0.1,0.2) (5,6),(x,8) (1,250),(500,999)"
  np.testing.assert_allclose(parse_boxes(text), [[.1, .2, .3, .4], [.001, .25, .5, .999]], atol=1e-6)


def test_placeholders_of_boxes():
  boxes = [np.array([BOX, (0.25, 0.25, 0.75, 0.75)], np.float32), np.array([(0.5, 0.5, 1, 1)], np.float32)]
  text = "A cat <box 0.1> by a ball <box 0.0>, and again <box 1.0>."
  assert referred_boxes(text) == [(0, 1), (0, 0), (1, 0)]
  assert fill_boxes(text, boxes, "integer") == (
      "A cat <Bbox> (250,250),(750,750) </Box> by a ball <Bbox> (125,0),(999,500) </Box>, and again "
      "<Bbox> (500,500),(999,999) </Box>.")
  for wrong, message in (("<box 0.2>", "<box 0.2>, but there are 2 boxes in picture 0"),
                         ("<box 2.0>", "<box 2.0>, but there are 2 pictures"),
                         ("<box 1>", "has <box 1>, which names no picture: write <box 0.1>")):
    with pytest.raises(UserError, match=message):
      fill_boxes(wrong, boxes, "decimal")


def test_placeholders_of_pictures():
  text = "<image 2>\nIs it <image 10>? "
  assert referred_pictures(text) == [2, 10] and referred_pictures("<image> <image x>") == []
  assert renumber_pictures(text, [2, 10]) == "<image 0>\nIs it <image 1>? "
  assert without_pictures(text) == "Is it ?" and without_pictures(" as it is ") == " as it is "
