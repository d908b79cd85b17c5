"""The sources: texts, boxes and masks of each example."""

import collections
import json

import numpy as np
import pytest

from refiner_export.export.images import open_upright
from refiner_export.records.record import BOX_PLACEHOLDER
from refiner_export.common.settings import UserError
from refiner_export.sources.coco import Coco
from refiner_export.sources.photos import Photos, credits


def said(example, task):
  return [(c.turns[0].text, c.turns[1].text) for c in example.conversations if c.task == task]


def test_coco_texts_and_objects(coco):
  examples = {example.id: example for example in coco.examples()}
  assert list(examples) == ["1", "2", "3", "4", "5"]
  first = examples["1"]
  assert first.captions == ("caption a of 1", "caption b of 1")
  assert said(first, "caption") == [("", "caption a of 1"), ("", "caption b of 1")]
  assert said(first, "rec") == [("the cat", "<box 0>")]
  assert [thing.tag for thing in first.objects] == ["cat", "dog", "dog"]
  assert first.objects[0].box == first.text_boxes[0] == (20 / 80, 10 / 60, 50 / 80, 30 / 60)
  assert examples["3"].objects[0].mask is None and examples["5"].objects == ()


def test_coco_crowds_are_no_objects_but_make_a_name_ambiguous(coco):
  second = coco.examples()[1]
  assert [thing.tag for thing in second.objects] == ["cat"] and said(second, "rec") == []


def test_coco_masks_agree_whatever_their_code(coco):
  masks = [thing.mask() for thing in coco.examples()[0].objects]
  for mask in masks:
    assert mask.shape == (60, 80) and mask.dtype == bool
    assert mask[11:29, 21:49].all() and not mask[:9].any() and not mask[:, 52:].any()
  np.testing.assert_array_equal(masks[1], masks[2])


def test_coco_errors_are_one_line(coco, tmp_path):
  def line(source):
    with pytest.raises(UserError) as error:
      source.examples()
    assert "\n" not in str(error.value)
    return str(error.value)

  assert line(Coco("/nowhere", coco.captions, coco.instances)).startswith("source.images not found: /nowhere.")
  assert line(Coco(coco.images, "/no.json", coco.instances)).startswith("source.captions not found: /no.json.")
  (tmp_path / "bad.json").write_text("{")
  assert line(Coco(coco.images, str(tmp_path / "bad.json"), coco.instances)).startswith("source.captions: ")
  assert "bad or missing entry 'categories'" in line(Coco(coco.images, coco.captions, coco.captions))


@pytest.fixture(scope="module")
def photos():
  return Photos().examples()


def test_photos_are_whole(photos):
  assert len(photos) >= 12 and len({photo.id for photo in photos}) == len(photos)
  assert set(credits()) == {photo.id for photo in photos} and all(credits().values())
  for photo in photos:
    assert open_upright(photo.read_image(), photo.id).size
    assert len(photo.captions) >= 3 and photo.objects
    for box in (*photo.text_boxes, *(thing.box for thing in photo.objects)):
      assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    for thing in photo.objects:
      assert thing.tag and thing.tag == thing.tag.lower().strip()


def test_boxes_in_the_file_lie_inside_the_pictures(photos):
  from refiner_export.sources import photos as module
  for entry, photo in zip(json.loads(module._PACKAGED.read_text()), photos):
    width, height = open_upright(photo.read_image(), photo.id).size
    for thing in entry["objects"]:
      x1, y1, x2, y2 = thing["box"]
      assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height, (photo.id, thing)


def test_photo_conversations(photos):
  for photo in photos:
    frequency = collections.Counter(thing.tag for thing in photo.objects)
    box_of = {thing.tag: thing.box for thing in photo.objects}
    tasks = collections.Counter(conversation.task for conversation in photo.conversations)
    assert set(tasks) == {"caption", "vqa", "dialogue", "multiple_choice", "region", "rec"}
    assert tasks["rec"] == sum(count == 1 for count in frequency.values())
    for question, answer in said(photo, "rec"):
      (index,) = BOX_PLACEHOLDER.findall(answer)
      assert frequency[question.removeprefix("the ")] == 1
      assert photo.text_boxes[int(index)] == box_of[question.removeprefix("the ")]
    for _, answer in said(photo, "dialogue"):
      # "Where is the X?" has one answer only when X is unique.
      box = photo.text_boxes[int(BOX_PLACEHOLDER.fullmatch(answer).group(1))]
      assert all(frequency[thing.tag] == 1 for thing in photo.objects if thing.box == box)
    for question, answer in said(photo, "multiple_choice"):
      assert f" {answer}" in question and " (a) " in question and " (b) " in question
    for conversation in photo.conversations:
      for turn in conversation.turns:
        assert all(int(index) < len(photo.text_boxes) for index in BOX_PLACEHOLDER.findall(turn.text))


def test_photos_errors_are_one_line(tmp_path):
  with pytest.raises(UserError, match="^source.annotations not found: /no.json. [^\n]*$"):
    Photos("/no.json").examples()
  path = tmp_path / "photos.json"
  path.write_text("[")
  with pytest.raises(UserError, match=f"^{path}: not JSON .*: mend the file$"):
    Photos(str(path)).examples()
  path.write_text(json.dumps([{"id": "x", "package": "skimage", "file": "data/astronaut.png", "captions": ["a"]}]))
  with pytest.raises(UserError, match=f"^{path}: photo x: bad or missing entry 'objects': mend the file$"):
    Photos(str(path)).examples()
  path.write_text(json.dumps([{"id": "x", "package": "skimage", "file": "data/nothing.png"}]))
  with pytest.raises(UserError, match="data/nothing.png: this version of scikit-image lacks the photo"):
    Photos(str(path)).examples()
