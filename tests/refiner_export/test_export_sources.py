"""The sources: units, texts, boxes and masks of each example."""

import collections
import itertools
import json
import shutil

import numpy as np
import pytest

from refiner_export.common.settings import UserError
from refiner_export.common.images import open_upright
from refiner_export.records.record import BOX_PLACEHOLDER
from refiner_export.sources.coco import Coco
from refiner_export.sources.photos import Photos


def said(example, task):
  return [(c.turns[0].text, c.turns[1].text) for c in example.conversations if c.task == task]


def test_coco_texts_and_objects(coco):
  examples = {example.id: example for example in coco.examples()}
  assert list(examples) == ["1", "2", "3", "4", "5"]
  first = examples["1"]
  assert first.captions == ("caption a of 1", "caption b of 1")
  assert said(first, "rec") == [("the cat", "<box 0.0>")]
  assert {conversation.task for conversation in first.conversations} == {"rec"}  # captions have one home
  (picture,) = first.pictures
  assert [thing.tag for thing in picture.objects] == ["cat", "dog", "dog"]
  assert picture.objects[0].box == picture.text_boxes[0] == (20 / 80, 10 / 60, 50 / 80, 30 / 60)
  assert examples["3"].pictures[0].objects[0].mask is None and examples["5"].pictures[0].objects == ()


def test_coco_crowds_are_no_objects_but_make_a_name_ambiguous(coco):
  second = list(coco.examples())[1]
  assert [thing.tag for thing in second.pictures[0].objects] == ["cat"] and said(second, "rec") == []


def test_coco_masks_agree_whatever_their_code(coco):
  masks = [thing.mask() for thing in next(coco.examples()).pictures[0].objects]
  for mask in masks:
    assert mask.shape == (60, 80) and mask.dtype == bool
    assert mask[11:29, 21:49].all() and not mask[:9].any() and not mask[:, 52:].any()
  np.testing.assert_array_equal(masks[1], masks[2])


def test_coco_errors_are_one_line(coco, tmp_path):
  def line(source):
    with pytest.raises(UserError) as error:
      list(source.examples())
    assert "\n" not in str(error.value)
    return str(error.value)

  assert line(Coco("/nowhere", coco.captions, coco.instances)).startswith("source.images not found: /nowhere.")
  assert line(Coco(coco.images, "/no.json", coco.instances)).startswith("source.captions not found: /no.json.")
  (tmp_path / "bad.json").write_text("{")
  assert line(Coco(coco.images, str(tmp_path / "bad.json"), coco.instances)).startswith("source.captions: ")
  assert "annotations[0] (id 0): bad or missing entry 'category_id'" in line(
      Coco(coco.images, coco.captions, coco.captions))
  instances = tmp_path / "instances.json"
  with open(coco.instances) as file:
    instances.write_text(file.read().replace('"bbox"', '"box"'))
  assert "bad or missing entry 'bbox'" in line(Coco(coco.images, coco.captions, str(instances)))


def test_an_edited_file_is_another_version_and_read_again(coco, tmp_path):
  captions = shutil.copy(coco.captions, tmp_path / "captions.json")
  source = Coco(coco.images, str(captions), coco.instances)
  (before,) = source.shards()
  assert (before.name, before.count) == ("captions.json", 5)
  captions.write_text(captions.read_text().replace("caption a", "Caption a"))  # as long as before
  (after,) = source.shards()
  assert before.version != after.version and (after.name, after.count) == ("captions.json", 5)
  assert next(source.read(after)).captions[0] == "Caption a of 1"


@pytest.fixture(scope="module")
def photos():
  return list(Photos().examples())


@pytest.mark.parametrize("start, stop", [(0, None), (0, 2), (2, 4), (3, None), (4, 99), (1, 1)])
def test_slices_are_those_of_the_whole(coco, photos, start, stop):
  for source, examples in (coco, list(coco.examples())), (Photos(), photos):
    (unit,) = source.shards()
    assert unit.count == len(examples)
    ids = [example.id for example in source.read_slice(unit, start, stop)]
    assert ids == [example.id for example in itertools.islice(source.read(unit), start, stop)]
    assert ids == [example.id for example in examples[start:stop]]


def test_photos_are_whole(photos):
  assert len(photos) >= 12 and len({photo.id for photo in photos}) == len(photos)
  for photo in photos:
    (picture,) = photo.pictures
    assert picture.credit and open_upright(picture.read(), photo.id).size
    assert len(photo.captions) >= 3 and picture.objects
    for box in (*picture.text_boxes, *(thing.box for thing in picture.objects)):
      assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    for thing in picture.objects:
      assert thing.tag and thing.tag == thing.tag.lower().strip()


def test_boxes_in_the_file_lie_inside_the_pictures(photos):
  from refiner_export.sources import photos as module
  for entry, photo in zip(json.loads(module._PACKAGED.read_text()), photos):
    width, height = open_upright(photo.pictures[0].read(), photo.id).size
    for thing in entry["objects"]:
      x1, y1, x2, y2 = thing["box"]
      assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height, (photo.id, thing)


def test_photo_conversations(photos):
  for photo in photos:
    objects, text_boxes = photo.pictures[0].objects, photo.pictures[0].text_boxes
    frequency = collections.Counter(thing.tag for thing in objects)
    box_of = {thing.tag: thing.box for thing in objects}
    tasks = collections.Counter(conversation.task for conversation in photo.conversations)
    assert set(tasks) == {"vqa", "dialogue", "multiple_choice", "region", "rec"}
    assert tasks["rec"] == sum(count == 1 for count in frequency.values())
    for question, answer in said(photo, "rec"):
      ((picture, index),) = BOX_PLACEHOLDER.findall(answer)
      assert frequency[question.removeprefix("the ")] == 1 and picture == "0"
      assert text_boxes[int(index)] == box_of[question.removeprefix("the ")]
    for _, answer in said(photo, "dialogue"):
      # "Where is the X?" has one answer only when X is unique.
      box = text_boxes[int(BOX_PLACEHOLDER.fullmatch(answer).group(2))]
      assert all(frequency[thing.tag] == 1 for thing in objects if thing.box == box)
    for question, answer in said(photo, "multiple_choice"):
      assert f" {answer}" in question and " (a) " in question and " (b) " in question
    for conversation in photo.conversations:
      for turn in conversation.turns:
        assert all(int(index) < len(text_boxes) for _, index in BOX_PLACEHOLDER.findall(turn.text))


def test_photos_errors_are_one_line(tmp_path):
  def line(path):
    with pytest.raises(UserError) as error:
      list(Photos(str(path)).examples())
    assert "\n" not in str(error.value)
    return str(error.value)

  assert line("/no.json").startswith("source.annotations not found: /no.json. ")
  path = tmp_path / "photos.json"
  path.write_text("[")
  assert line(path).startswith(f"{path}: not JSON ") and line(path).endswith(": mend the file")
  path.write_text(json.dumps([{"id": "x", "package": "skimage", "file": "data/astronaut.png", "captions": ["a"]}]))
  assert line(path) == f"{path}: photo x: bad or missing entry 'objects': mend the file"
  path.write_text(json.dumps([{"id": "x", "package": "skimage", "file": "data/nothing.png"}]))
  assert "data/nothing.png: this version of scikit-image lacks the photo" in line(path)
