"""Annotations as they are found: turned pictures, hostile masks and texts, ids that match nothing, odd files."""

import dataclasses
import functools
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from refiner_export.common.images import UnreadableImage
from refiner_export.common.settings import UserError
from refiner_export.export import pipeline
from refiner_export.export.cleaning import clean
from refiner_export.export.config import ImageSettings
from refiner_export.export.run import export
from refiner_export.records.formats import write_shard
from refiner_export.records.manifest import Manifest
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import Conversation, Turn, escape
from refiner_export.records.verify import verify
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture
from refiner_export.sources.coco import Coco
from refiner_export.sources.coco_masks import mask_of
from refiner_export.sources.photos import Photos

WIDTH, HEIGHT = 60, 40
BOX = (5, 10, 25, 20)  # pixels of the stored picture, where it is white


def turned_file(orientation: int, format: str) -> bytes:
  """A black picture, stored as 60x40, with a white box; EXIF has the orientation."""
  image, exif = Image.new("RGB", (WIDTH, HEIGHT)), Image.Exif()
  ImageDraw.Draw(image).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill="white")
  exif[0x0112] = orientation
  file = io.BytesIO()
  image.save(file, format, exif=exif)
  return file.getvalue()


def annotated(data: bytes, size: tuple[int, int] | None, **fields) -> SourceExample:
  mask = np.zeros((HEIGHT, WIDTH), bool)
  mask[BOX[1]:BOX[3], BOX[0]:BOX[2]] = True
  box = (BOX[0] / WIDTH, BOX[1] / HEIGHT, BOX[2] / WIDTH, BOX[3] / HEIGHT)
  thing = SourceObject("box", box, functools.partial(np.copy, mask))
  return SourceExample("x", (SourcePicture(functools.partial(bytes, data), (thing,), (box,), size=size, **fields),))


def white_box(image: Image.Image) -> list[float]:
  rows, columns = np.nonzero(np.asarray(image.convert("L")) > 128)
  return [columns.min() / image.width, rows.min() / image.height, (columns.max() + 1) / image.width,
          (rows.max() + 1) / image.height]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_turn_with_the_picture(orientation, format):
  """The size tells when sides change places. In the other cases the source has to say it."""
  example = annotated(turned_file(orientation, format), (WIDTH, HEIGHT), as_stored=2 <= orientation <= 4)
  (stored,) = pipeline.read(example, ImageSettings(max_side=60, quality=100))
  (thing,) = stored.source.objects
  np.testing.assert_allclose(thing.box, white_box(stored.image), atol=1e-6)
  assert stored.source.text_boxes == (thing.box,)
  np.testing.assert_array_equal(thing.mask(), np.asarray(stored.image.convert("L")) > 128)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_annotations_of_the_upright_picture_stay(orientation):
  size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
  for declared, as_stored in ((size, False), (None, False), (size, orientation >= 5)):
    example = annotated(turned_file(orientation, "PNG"), declared, as_stored=as_stored)
    (stored,) = pipeline.read(example, ImageSettings())
    assert stored.source.objects == example.pictures[0].objects


def test_annotations_of_another_picture_are_refused():
  for orientation, upright in (1, "60x40"), (6, "40x60"):
    found = pipeline.read(annotated(turned_file(orientation, "PNG"), (61, 40)), ImageSettings())
    assert isinstance(found, UnreadableImage) and not found.is_unread
    assert found.reason == f"{upright} pixels, its annotations are for 61x40"
  large = Image.new("RGB", (5000, 4000))  # decoded smaller, but compared at its whole size
  file = io.BytesIO()
  large.save(file, "JPEG")
  assert not isinstance(pipeline.read(annotated(file.getvalue(), (5000, 4000)), ImageSettings()), UnreadableImage)


# --- COCO files ---


def edit(source: Coco, folder, change) -> Coco:
  """A copy of the annotation files after `change(captions, instances)`, with the same pictures."""
  trees = [json.loads(open(path).read()) for path in (source.captions, source.instances)]
  change(*trees)
  for name, tree in zip(("captions.json", "instances.json"), trees):
    (folder / name).write_text(json.dumps(tree))
  return dataclasses.replace(source, captions=str(folder / "captions.json"), instances=str(folder / "instances.json"))


def change_first(file: int, array: str, **fields):
  def change(*trees):
    trees[file][array][0].update(fields)
  return change


def without(name: str):
  def change(captions, instances):
    for entry in instances["annotations"]:
      del entry[name]
  return change


def dropped(source: Coco) -> dict[str, int]:
  (unit,) = source.shards()
  counts = dict(source.unmatched(unit))
  for example in source.read(unit):
    for reason in clean(example).dropped:
      counts[reason] = counts.get(reason, 0) + 1
  return counts


@pytest.mark.parametrize("change, count", [
    (change_first(0, "annotations", image_id=99), {"caption: its image_id is no picture's id": 1}),
    (change_first(1, "annotations", image_id="99"), {"object: its image_id is no picture's id": 1}),
    (change_first(1, "annotations", category_id=99), {"object: its category_id is no category's id": 1}),
    (change_first(1, "categories", name=" "), {"object: its category has no name": 2}),
    (change_first(1, "annotations", bbox=[20, float("nan"), 3, 3]), {"object: a number of its box is not finite": 1}),
    (change_first(1, "annotations", bbox=[20, 10, 10**400, 3]), {"object: a number of its box is not finite": 1}),
    (change_first(1, "annotations", bbox=[80, 10, 5, 5]), {"object: its box lies outside of the picture": 1}),
    (change_first(1, "annotations", bbox=[5, -9, 5, 5]), {"object: its box lies outside of the picture": 1}),
    (change_first(1, "annotations", bbox=[5, 5, 5, 0]), {"object: its box has no area": 1}),
    (change_first(1, "annotations", segmentation=[[1, 1, 5, 5]]), {"mask cannot be used: its box stands for it": 1}),
    (change_first(0, "annotations", caption=" "), {"caption: empty": 1}),
    (change_first(0, "annotations", caption=7), {"caption: not a text": 1}),
    (change_first(0, "annotations", caption="\ud800"), {"caption: not valid Unicode": 1}),
    (lambda captions, _: captions["images"].append(captions["images"][0]), {"a picture is listed again": 1}),
    (lambda _, instances: instances["categories"].append(instances["categories"][0]),
     {"a category is listed again": 1}),
    (without("iscrowd"), {}), (without("segmentation"), {})])
def test_what_is_left_out_is_counted(coco, tmp_path, change, count):
  assert dropped(edit(coco, tmp_path, change)) == count


@pytest.mark.parametrize("change, message", [
    (change_first(1, "annotations", bbox=[1, 2, 3]), "annotations[0] (id 0): bad or missing entry 'bbox' [1, 2, 3]: "),
    (change_first(0, "images", width=0), "images[0] (id 5): bad or missing entry 'width' 0: expected a number of "),
    (change_first(0, "images", height=-1), "images[0] (id 5): bad or missing entry 'height' -1: "),
    (change_first(0, "images", file_name=None), "images[0] (id 5): bad or missing entry 'file_name' None: "),
    (change_first(0, "images", id=[1]), "images[0] (id [1]): bad or missing entry 'id' [1]: "),
    (change_first(0, "images", id="1"), "images[1] (id 1): '1.jpg' has the id of '5.jpg': mend the file"),
    (change_first(1, "categories", id=2), "categories[1] (id 2): 'dog' has the id of 'Cat': mend the file"),
    (without("category_id"), "annotations[0] (id 0): bad or missing entry 'category_id': "),
    (lambda captions, _: captions.update(images=3), "captions.json: images is not an array"),
    (lambda captions, _: captions["annotations"].append(3), "annotations[10] is not an object")])
def test_a_file_of_another_form_is_named_with_entry_and_id(coco, tmp_path, change, message):
  with pytest.raises(UserError) as error:
    edit(coco, tmp_path, change).shards()
  assert message in str(error.value) and "\n" not in str(error.value)


def test_nothing_matches(coco, tmp_path):
  def strangers(file, name):
    def change(*trees):
      for entry in trees[file]["annotations"]:
        entry[name] = f"x{entry[name]}"
    return change

  for file, name, message in (
      (0, "image_id", "none of its 10 annotations belongs to a picture: an image_id is 'x4', an id of a picture 1"),
      (1, "image_id", "none of its 6 annotations belongs to a picture: an image_id is 'x3', an id of a picture 1"),
      (1, "category_id", "none of its annotations has a category of the file")):
    with pytest.raises(UserError) as error:
      edit(coco, tmp_path, strangers(file, name)).shards()
    assert message in str(error.value)


def test_ids_as_texts_meet_ids_as_numbers(coco, tmp_path):
  def change(captions, instances):
    for entry in (*captions["images"], *instances["annotations"]):
      entry["id"] = str(entry["id"])
    for entry in instances["annotations"]:
      entry["image_id"], entry["category_id"] = float(entry["image_id"]), str(entry["category_id"])

  source = edit(coco, tmp_path, change)
  assert dropped(source) == {}
  for one, other in zip(source.examples(), coco.examples(), strict=True):
    assert (one.id, one.captions, one.conversations) == (other.id, other.captions, other.conversations)


def test_lvis_cvat_and_roboflow(coco, tmp_path):
  """They have one file without captions. LVIS names its pictures by their address alone."""
  def change(_, instances):
    for entry in instances["annotations"]:
      del entry["iscrowd"]
    for image in instances["images"]:
      image["coco_url"] = f"http://images.cocodataset.org/val/{image.pop('file_name')}"

  source = dataclasses.replace(edit(coco, tmp_path, change), captions=None)
  examples = list(source.examples())
  assert [example.id for example in examples] == ["1", "2", "3", "4", "5"] and not any(e.captions for e in examples)
  assert [thing.tag for thing in examples[0].pictures[0].objects] == ["cat", "dog", "dog"]
  assert examples[0].pictures[0].read()[:2] == b"\xff\xd8"
  with pytest.raises(UserError, match="name captions, instances or both"):
    Coco(coco.images).finalize("source")


def test_odd_paths(coco, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", os.path.dirname(coco.images))
  home = Coco("~/images", "~/captions.json", "~/instances.json")
  assert next(home.examples()).pictures[0].read() == next(coco.examples()).pictures[0].read()
  with pytest.raises(UserError, match=f"^source.captions: {tmp_path} is a folder. "):
    dataclasses.replace(coco, captions=str(tmp_path)).shards()
  for path in "/dev/zero", str(tmp_path / "pipe"):
    if path != "/dev/zero":
      os.mkfifo(path)
    with pytest.raises(UserError, match=f"^source.instances: {path} is no regular file. "):
      dataclasses.replace(coco, instances=path).shards()


@pytest.mark.parametrize("data, message", [
    (b"", "is not JSON (it ends too early"), (b"[]", "holds no object of arrays"),
    (b"{}", "bad or missing entry 'images'"),
    (b'{"images": ' + b"[" * 100_000, "is not JSON"), (b'{"images": [{"id": "\xff"}]}', "is not JSON"),
    (b'{"images": [], "images": []}', "has 'images' twice"), (b'{"images": []} x', "something follows its end")])
def test_what_is_no_annotation_file(coco, tmp_path, data, message):
  (tmp_path / "captions.json").write_bytes(data)
  with pytest.raises(UserError) as error:
    dataclasses.replace(coco, captions=str(tmp_path / "captions.json")).shards()
  assert str(error.value).startswith(f"source.captions: {tmp_path}") and message in str(error.value)
  assert "\n" not in str(error.value)


def test_pictures_outside_of_the_folder_are_not_read(coco, tmp_path, make):
  images = shutil.copytree(coco.images, tmp_path / "images")
  shutil.copy(images / "1.jpg", tmp_path / "secret.jpg")
  (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
  (images / "inner.jpg").symlink_to(images / "5.jpg")
  names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "a/../../secret.jpg", "inner.jpg"]

  def change(captions, _):
    for image, name in zip(captions["images"], names):
      image["file_name"] = name

  source = dataclasses.replace(edit(coco, tmp_path, change), images=str(images))
  manifest = export(make(source, tmp_path / "out"))
  errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
  assert manifest.records == 1 and len(errors) == 4
  assert all(" lies outside of " in error["reason"] for error in errors)


PHOTO = {"id": "x", "package": "skimage", "file": "data/astronaut.png", "captions": ["a"],
         "objects": [{"tag": "Cat", "box": [1, 2, 300, 400]}], "description": {"object": 0, "text": "a cat"},
         "questions": [{"task": "what", "question": "what?", "answer": "a cat"}]}


@pytest.mark.parametrize("change, message", [
    ({"file": "../../etc/hostname"}, "'../../etc/hostname' lies outside of skimage"),
    ({"file": "/etc/hostname"}, "lies outside of skimage"), ({"package": "os"}, "bad or missing entry 'os'"),
    ({"id": ""}, "photo 0: bad or missing entry 'id'"), ({"objects": 3}, "'objects': expected a list"),
    ({"objects": [{"tag": 3, "box": [1, 2, 3, 4]}]}, "photo x: bad or missing entry"),
    ({"objects": [{"tag": "a", "box": [1, 2, 3]}]}, "photo x: bad or missing entry"),
    ({"description": []}, "photo x: bad or missing entry"), ({"questions": [{"task": "where"}]}, "photo x: bad or "),
    ({"captions": "a"}, "'captions': expected a list")])
def test_photos_of_another_form(tmp_path, change, message):
  (tmp_path / "photos.json").write_text(json.dumps([PHOTO | change]))
  with pytest.raises(UserError) as error:
    Photos(str(tmp_path / "photos.json")).shards()
  assert message in str(error.value) and "\n" not in str(error.value)


def test_photos_with_bad_texts_and_boxes(tmp_path):
  change = {"captions": ["fine", "", 3, "<image 0>"], "objects": PHOTO["objects"] + [
      {"tag": "dog", "box": [1, 1, float("nan"), 5]}, {"tag": "owl", "box": [10**400, 1, 5, 5]}]}
  (tmp_path / "photos.json").write_text(json.dumps([PHOTO | change, PHOTO | {"id": "y", "file": "__init__.py"}]))
  example, no_picture = map(clean, Photos(str(tmp_path / "photos.json")).examples())
  assert no_picture.fault == "not a picture" and example.captions == ("fine", "< image 0>")
  assert [thing.tag for thing in example.pictures[0].objects] == ["cat"]
  assert [turn.text for talk in example.conversations for turn in talk.turns] == [
      "what?", "a cat", "<box 0.0>", "a cat", "the cat", "<box 0.0>"]
  with pytest.raises(UserError, match="photo x: two photos have this id"):
    (tmp_path / "photos.json").write_text(json.dumps([PHOTO, PHOTO]))
    Photos(str(tmp_path / "photos.json")).shards()


# --- masks ---


def test_masks_that_pycocotools_should_not_see():
  good = [4.0, 3, 14, 3, 14, 11]
  for segmentation in ([[1, 1, 5, 5]], [[1, 1, 5, 1, 9, 1]], [[]], [good[:5]], [["a"] * 6], [[float("nan")] * 6],
                       [[1e9, 1, 5, 1, 9, 9]], [[0.0, 0, 1e308, 1e308, 0, 5]], [good, None], "polygon", 7,
                       [[-9, -9, -5, -9, -9, -5]],
                       {"counts": []}, {"counts": [1, 2], "size": [16, 24]}, {"counts": [0, 384], "size": [24, 16]},
                       {"counts": [0, -1, 385], "size": [16, 24]}, {"counts": "o" * 400, "size": [16, 24]},
                       {"counts": "PPP", "size": [10**6, 10**6]}, {"counts": None}, {"counts": "\ud800"},
                       {"counts": [384], "size": [16, 24]}, [[0, 0, 24, 0, 0, 16] * 10**6]):
    with pytest.raises(ValueError):
      mask_of(segmentation, 16, 24)
  with pytest.raises(ValueError):
    mask_of({"counts": [0, 10**12]}, 10**6, 10**6)
  assert mask_of(None, 16, 24) is mask_of([], 16, 24) is None
  whole = mask_of([good, [1, 1, 5, 5]], 16, 24)()  # a piece of no area beside a good one does no harm
  assert whole.shape == (16, 24) and 20 < whole.sum() < 60


# --- what holds for every source ---


def test_texts_from_outside_are_escaped(coco, tmp_path, make):
  assert escape("<box 7> <image 0> <box 0.1> <b> <boxes 3>") == "< box 7> < image 0> < box 0.1> <b> <boxes 3>"

  def change(captions, instances):
    captions["annotations"][2]["caption"] = "a <box 7> and <box 0.0>"
    captions["annotations"][3]["caption"] = "\ud83d"
    captions["annotations"][5]["caption"] = 3.5
    instances["categories"][0]["name"] = "<box 0.0>"
    instances["annotations"][3]["bbox"] = [200, 1, 5, 5]

  manifest = export(make(edit(coco, tmp_path, change), tmp_path / "out"))
  directory = RecordDirectory(tmp_path / "out")
  assert directory[0].captions == ("a < box 7> and < box 0.0>",) and directory[0].picture.tags[0] == "< box 0.0>"
  assert manifest == Manifest.load(tmp_path / "out") and manifest.dropped == {
      "caption: not a text": 1, "caption: not valid Unicode": 1, "object: its box lies outside of the picture": 1}
  assert list(verify(tmp_path / "out")) == []


def test_what_was_left_out_is_printed(coco, tmp_path, make, capsys):
  export(make(edit(coco, tmp_path, change_first(0, "annotations", image_id=99)), tmp_path / "out"))
  assert "left out 1 times: caption: its image_id is no picture's id\n" in capsys.readouterr().out


def test_cleaning():
  turn = functools.partial(Turn, "user")

  def talk(answer, question="where?", task="rec"):
    return Conversation(task, (turn(question), Turn("assistant", answer)))

  nan = float("nan")
  picture = SourcePicture(bytes, (
      SourceObject("cat", (0.1, 0.1, 0.5, 0.5)), SourceObject("", (0.1, 0.1, 0.5, 0.5)),
      SourceObject("dog", (0.1, nan, 0.5, 0.5)), SourceObject("dog", (0.5, 0.1, 0.4, 0.5)),
      SourceObject("dog", (0.1, 0.1, 1.5, 0.5)), SourceObject("edge", (0.1, 0.1, 1 + 1e-9, 0.5)),
      SourceObject("thin", (0.1, 0.1, 0.5, 0.5), functools.partial(np.zeros, (4, 4), bool))),
      ((0.1, 0.1, 0.2, 0.2), (nan, 0, 1, 1)), credit=3)
  example = clean(SourceExample("a", (picture,), ("fine", None, ""), (
      talk("<box 0.0>"), talk("<box 0.1>"), talk("<box 1.0>"), talk("<box 3>"), talk(""), talk("a", "<image 1>"),
      talk("a", task=4), Conversation("vqa", (turn("a"),)), Conversation("vqa", ()),
      talk("<box 99999999999999999999.0>"))))
  assert [thing.tag for thing in example.pictures[0].objects] == ["cat", "edge", "thin"]
  assert example.pictures[0].objects[1].box[2] == 1 and example.pictures[0].objects[2].mask is None
  assert example.captions == ("fine",) and example.conversations == (talk("<box 0.0>"),)
  assert len(example.dropped) == 4 + 1 + 1 + 2 + 9
  assert clean(SourceExample(5)).fault == "its id is not a text"


def test_verify_sees_empty_texts(finished, tmp_path):
  """They come from directories that were made before texts were cleaned."""
  directory = RecordDirectory(finished)
  record, schema = directory[0], directory.manifest.schema()
  picture = dataclasses.replace(record.picture, tags=("cat", " ", "dog"))
  record = dataclasses.replace(record, pictures=(picture,), captions=("a", ""))
  shards = directory.manifest.shards
  info = write_shard(tmp_path / shards[0].file, [schema.item(record)])
  dataclasses.replace(directory.manifest, shards=(info,), files={}).save(tmp_path)
  problems = "\n".join(verify(tmp_path))
  assert "record 0: captions[1] is empty" in problems and "record 0: picture 0: tags[1] is empty" in problems
