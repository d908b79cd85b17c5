"""The gallery shows what is in a record: scores, boxes in their places, masks in the colours of their objects."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image, ImageColor
from pycocotools import mask as coco_mask

from refiner_export.pages import page
from refiner_export.records.formats import write_shard
from refiner_export.pages.gallery import render
from refiner_export.records.manifest import Manifest, shard_name
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import OPTIONAL_FIELDS, USER, Conversation, Turn
from refiner_export.records.schema import Schema

MASKS = np.zeros((3, 60, 80), bool)
MASKS[0, :, :40] = True       # the left half
MASKS[1, 10:30, 10:30] = True  # a square in it
MASKS[2, 5:55, 50:70] = True


@pytest.fixture(scope="module")
def with_masks(finished):
  """The picture of the finished export's first record, with masks."""
  rles = tuple(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"] for mask in MASKS)
  return dataclasses.replace(
      RecordDirectory(finished)[0].picture, scores=np.array([0.9, 0.625, 0.25], np.float32), mask_rles=rles,
      mask_ious=np.array([0.75, 0.5, 1], np.float32), mask_areas=MASKS.mean((1, 2)).astype(np.float32))


def page_of(record, finished, directory) -> str:
  """The gallery of a directory with this record alone."""
  manifest = Manifest.load(finished)
  schema = Schema(manifest.feature_dtype, manifest.fingerprint, OPTIONAL_FIELDS)
  shard = write_shard(directory / shard_name(0, 1), [schema.item(record)])
  dataclasses.replace(manifest, shards=(shard,), records=1, pictures=shard.pictures,
                      optional_fields=OPTIONAL_FIELDS, files={}).save(directory)
  return render(RecordDirectory(directory), limit=1)


@pytest.fixture(scope="module")
def text(finished, with_masks, tmp_path_factory):
  record = dataclasses.replace(RecordDirectory(finished)[0], pictures=(with_masks,))
  return page_of(record, finished, tmp_path_factory.mktemp("masks"))


def test_objects_have_their_scores_and_notes(text):
  labels = re.findall(r'class="label[^"]*"(?: title="([^"]*)")? style="[^"]*">([^<]*)<', text)
  assert sorted(labels, reverse=True) == sorted([
      ("predicted IoU 0.75, 50.0% of the picture", "cat 0.90"), ("predicted IoU 0.50, 8.3% of the picture", "dog 0.62"),
      ("predicted IoU 1.00, 20.8% of the picture", "dog 0.25")], reverse=True)


def test_boxes_are_where_the_record_has_them(text, with_masks):
  drawn = re.findall(r'<rect x="([^"]*)" y="([^"]*)" width="([^"]*)" height="([^"]*)"', text)
  corners = [[x, y, x + width, y + height] for x, y, width, height in (map(float, box) for box in drawn)]
  np.testing.assert_allclose(sorted(corners), sorted((100 * with_masks.boxes).tolist()), atol=1e-4)


def test_masks_lie_over_the_picture_in_the_colours_of_their_objects(text):
  (data,) = re.findall(r'class="overlay" src="data:image/png;base64,([^"]*)"', text)
  overlay = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
  assert overlay.shape == (60, 80, 4)
  colours = [ImageColor.getrgb(page.object_colour(k)) for k in range(3)]
  np.testing.assert_array_equal(overlay[..., 3] > 0, MASKS.any(axis=0))
  for (row, column), k in {(40, 20): 0, (20, 20): 1, (30, 60): 2, (40, 0): 0, (10, 10): 1, (5, 50): 2}.items():
    assert tuple(overlay[row, column, :3]) == colours[k]
  # Photos show through the insides; the contours are nearly solid.
  assert set(overlay[[40, 20, 30], [20, 20, 60], 3]) == {90} and set(overlay[[40, 10, 5], [0, 10, 50], 3]) == {230}


def test_without_masks_there_is_no_overlay(finished, with_masks):
  assert page.draw_masks(RecordDirectory(finished)[0].picture) == ""
  empty = np.asfortranarray(np.zeros((60, 80), np.uint8))
  nothing = dataclasses.replace(with_masks, mask_rles=(coco_mask.encode(empty)["counts"],) * 3)
  assert not np.asarray(Image.open(io.BytesIO(base64.b64decode(page.draw_masks(nothing))))).any()
  assert '<img class="overlay"' not in render(RecordDirectory(finished), limit=4)


def test_the_header_says_what_storing_cost(text, with_masks):
  plain = " ".join(re.sub("<[^>]*>", " ", text).split())
  assert "features 16 rows, bfloat16, 10 kB" in plain and "shards 1 tfrecord" in plain
  assert re.search(r"error of features 0(\.0+\d+)? %", plain)  # these features had been rounded before


@pytest.mark.parametrize("left, anchor", [(10, "left:10.0%"), (90, "right:5.0%")])
def test_labels_at_the_right_edge_end_with_their_box(finished, left, anchor):
  box = page.Box.of(np.array([left, 50, left + 5, 60]) / 100, "a long label", "#123456")
  photo = page.photo(RecordDirectory(finished)[0].picture, [box], alt="")
  template = page.pathlib.Path(page.__file__).parent / "card.html.jinja"
  environment = page.jinja2.Environment(loader=page.jinja2.FileSystemLoader(template.parent), autoescape=True)
  drawn = str(environment.get_template(template.name).module.photo(photo))
  found = re.search(r'style="([a-z]+):([0-9.]+)%;top', drawn)
  assert found[1] == anchor.split(":")[0] and float(found[2]) == pytest.approx(float(anchor.split(":")[1][:-1]))


def test_several_pictures_and_their_credits(finished, with_masks, tmp_path):
  """Each picture is there once, in order; texts name pictures, and the objects of any picture."""
  first = dataclasses.replace(with_masks, credit="Photo: <Ann>")
  second = dataclasses.replace(first, tags=("bird", "fox", "fox"))
  third = dataclasses.replace(second, credit="Photo: Bob")
  turns = (Turn(USER, "compare <image 0> with <image 2>"), Turn("assistant", "<box 1.0>, not <box 0.0>"))
  record = dataclasses.replace(RecordDirectory(finished)[0], pictures=(first, second, third),
                               conversations=(Conversation("dialogue", turns),))
  text = page_of(record, finished, tmp_path)
  assert len(re.findall('<div class="photo">', text)) == len(re.findall('class="overlay"', text)) == 3
  assert "80x60, 3 objects; 80x60, 3 objects; 80x60, 3 objects" in text
  assert text.count("Photo: &lt;Ann&gt;") == 1 and text.count("Photo: Bob") == 1
  chips = re.findall(r'<span class="chip"[^>]*>([^<]*)</span>', text)
  assert chips == ["picture 1", "picture 3", "bird", "cat"]


def test_a_record_of_text_alone(finished, tmp_path):
  record = dataclasses.replace(RecordDirectory(finished)[0], pictures=(), conversations=())
  text = page_of(record, finished, tmp_path)
  assert "<img" not in text and "text alone" in text and "caption a of 1" in text


def test_what_search_and_filters_look_at(finished):
  text = render(RecordDirectory(finished), limit=4)
  assert re.findall(r'<option value="([^"]*)">', text) == ["", "cat", "dog", "", "not a picture"]
  cards = re.findall(r'<article( hidden)? data-tags="([^"]*)"(?: data-reason="([^"]*)")? data-text="([^"]*)"', text)
  assert [tags for hidden, tags, _, _ in cards if not hidden] == ["cat\ndog", "cat", "dog", ""]
  assert cards[0][3].startswith("1 caption a of 1 caption b of 1 cat dog dog ")
  assert cards[-1] == (" hidden", "", "not a picture", "4 not a picture")


def test_a_random_sample(finished):
  directory = RecordDirectory(finished)
  pages = {seed: re.findall("<b>([^<]*)</b>, 80x60", render(directory, 2, seed)) for seed in range(1, 20)}
  assert all(len(ids) == 2 and ids == sorted(ids) for ids in pages.values())
  assert {id for ids in pages.values() for id in ids} == {"1", "2", "3", "5"}
  assert "Shown: 2, drawn at random, of 4 records." in render(directory, 2, 1)


def test_the_list_of_names_points_at_the_boxes(text):
  names = re.findall(r'<span data-object="(\d)" style="border-color:(#\w*)"[^>]*>([^<]*)<', text)
  assert names == [("0", page.object_colour(0), "cat 0.90"), ("1", page.object_colour(1), "dog 0.62"),
                   ("2", page.object_colour(2), "dog 0.25")]
  for number, colour, label in names:
    assert f'stroke="{colour}" data-object="{number}"/>' in text
    assert re.search(f'<span data-object="{number}" class="label[^>]*background:{colour}">{label}<', text)
