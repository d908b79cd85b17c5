"""The record's schema: what goes in comes out, within the stated tolerance, and wrong records are refused in words."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pycocotools import mask as coco_mask

from refiner_export.common.settings import UserError
from refiner_export.records import schema as schema_module
from refiner_export.records.features import FEATURE_DTYPES
from refiner_export.records.record import (
    ASSISTANT, OPTIONAL_FIELDS, USER, Conversation, Picture, Record, RecordError, Turn, check)
from refiner_export.records.schema import Schema, fingerprint


def picture(objects=3, rows=5, seed=1, **changes) -> Picture:
  draw = np.random.default_rng(seed)
  values = dict(
      image=b"\xff\xd8jpeg\x00%d" % seed, height=60, width=80,
      text_boxes=draw.random((2, 4), np.float32), tags=tuple(f"tag {k}" for k in range(objects)),
      boxes=draw.random((objects, 4), np.float32), scores=draw.random(objects, np.float32),
      detection_features=draw.normal(size=(rows, 256)).astype(np.float32),
      detection_boxes=draw.random((rows, 4), np.float32),
      mask_features=draw.normal(size=(objects, 256)).astype(np.float32),
      mask_ious=draw.random(objects, np.float32), mask_areas=draw.random(objects, np.float32),
      mask_rles=tuple(b"PPYo0%d" % k for k in range(objects)), credit="Photo: \u00c4nne")
  return Picture(**{**values, **changes})


def talk(*texts: str) -> Conversation:
  """Turns of these texts, which user and assistant speak in turn."""
  return Conversation("vqa", tuple(Turn((USER, ASSISTANT)[k % 2], text) for k, text in enumerate(texts)))


def record(*pictures: Picture, **changes) -> Record:
  """With one picture, unless others are given."""
  values = dict(
      id="7", source="test", captions=("one", "zwei \u00e4"),
      conversations=(talk("q", "a", "r", ""), talk("the cat", "<box 0.1>")))
  return Record(**{**values, "pictures": pictures or (picture(),), **changes})


def text_only() -> Record:
  return Record("8", "test", (), ("nothing to see",), (talk("hello", "hi"),))


def assert_read(read: Picture, before: Picture, relative: float = 0.0, of_largest: float = 0.0) -> None:
  """That a picture is what it was; values of features may be off by parts of themselves and of their row's largest."""
  for field in dataclasses.fields(Picture):
    old, new = getattr(before, field.name), getattr(read, field.name)
    if field.name in ("detection_features", "mask_features"):
      allowed = np.abs(old) * relative + np.abs(old).max(axis=1, keepdims=True, initial=0) * of_largest
      assert new.dtype == np.float32 and new.shape == old.shape
      assert (np.abs(new - old) <= allowed + 2**-25).all()
    elif field.name == "detection_boxes":
      np.testing.assert_allclose(new, old, atol=8e-6)
    elif isinstance(old, np.ndarray):
      np.testing.assert_array_equal(new, old)
    else:
      assert new == old


# float16 keeps 11 bits of a value, but nothing below 2^-24; bfloat16 8 bits; int8 steps of a row's largest value / 127.
@pytest.mark.parametrize("dtype, relative, of_largest", [
    ("float16", 2**-11, 0), ("bfloat16", 2**-8, 0), ("int8", 0, 0.502 / 127)])
@pytest.mark.parametrize("pictures", [
    [(3, 5)], [(0, 0)], [], [(3, 5), (2, 5), (1, 5)], [(0, 4), (2, 4)], [(2, 0), (0, 3), (4, 1)]])
def test_round_trip(dtype, relative, of_largest, pictures):
  """Pictures are given by their numbers of objects and detector rows."""
  made = [picture(objects, rows, seed) for seed, (objects, rows) in enumerate(pictures)]
  original = record(pictures=tuple(made), conversations=(talk("q", "a", "r", ""),))
  schema = Schema(dtype, "f" * 12, OPTIONAL_FIELDS)
  read = schema.decode(schema.encode(original))
  assert dataclasses.replace(read, pictures=()) == dataclasses.replace(original, pictures=())
  for before, after in zip(original.pictures, read.pictures, strict=True):
    assert_read(after, before, relative, of_largest)


def test_the_only_picture():
  assert record().picture.image == picture().image
  for other in (text_only(), record(picture(), picture())):
    with pytest.raises(RecordError, match=f"^record .: expected one picture, it has {len(other.pictures)}$"):
      other.picture


@pytest.mark.parametrize("optional", [(), ("mask_areas",), ("mask_ious", "mask_rles")])
def test_optional_fields_are_there_when_asked_for(optional):
  schema, original = Schema("int8", "f", optional), record(picture(3, seed=1), picture(2, seed=2))
  read = schema.decode(schema.encode(original))
  for before, after in zip(original.pictures, read.pictures, strict=True):
    for name in OPTIONAL_FIELDS:
      assert list(getattr(after, name)) == (list(getattr(before, name)) if name in optional else [])


def test_masks_are_read_as_coco_does():
  draw = np.random.default_rng(2)
  masks = draw.random((2, 60, 80)) < np.array([0.3, 0.9])[:, None, None]
  rles = tuple(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"] for mask in masks)
  schema = Schema("int8", "f", ("mask_rles",))
  read = schema.decode(schema.encode(record(picture(2, mask_rles=rles)))).picture
  for mask, rle in zip(masks, read.mask_rles, strict=True):
    np.testing.assert_array_equal(coco_mask.decode({"size": [read.height, read.width], "counts": rle}), mask)


def test_errors_of_int8_are_half_a_scale_at_most():
  schema = Schema("int8", "f")
  draw = np.random.default_rng(3)
  rows = (draw.normal(size=(40, 256)) * 10.0 ** draw.integers(-5, 5, (40, 1))).astype(np.float32)
  data = schema.encode(record(picture(detection_features=rows, detection_boxes=np.zeros((40, 4), np.float32))))
  scales = schema.features.deserialize_example_np(data)["detection_scales"].astype(np.float64)
  error = np.abs(schema.decode(data).picture.detection_features - rows.astype(np.float64)).max(axis=1)
  largest = np.abs(rows).max(axis=1)
  assert (error <= scales / 2 * (1 + 1e-5)).all()
  assert (scales[largest > 1] < 1.002 * largest[largest > 1] / 127).all()  # scales are as fine as float16 allows


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_features_out_of_range_are_refused(dtype):
  given = record(picture(mask_features=np.full((3, 256), 1e7, np.float32)))
  with pytest.raises(RecordError, match=f"^record 7: a feature of 1e[+]07 is too large for features.dtype={dtype}: "):
    Schema(dtype, "f").encode(given)
  schema = Schema("bfloat16", "f")
  read = schema.decode(schema.encode(given))
  np.testing.assert_allclose(read.picture.mask_features, 1e7, rtol=2**-8)


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
def test_boxes_do_not_depend_on_the_type_of_features(dtype):
  schema, boxes = Schema(dtype, "f"), np.random.default_rng(4).random((5, 4)).astype(np.float32)
  read = schema.decode(schema.encode(record(picture(detection_boxes=boxes)))).picture
  assert np.abs(read.detection_boxes - boxes.astype(np.float64)).max() <= 0.5 / 65535 + 1e-7


@pytest.mark.parametrize("top_k", [1, 4, 7, 100])
def test_top_k_keeps_the_rows_of_highest_score(top_k):
  draw = np.random.default_rng(5)
  scores, rows, boxes = draw.random(7), draw.normal(size=(7, 256)).astype(np.float32), draw.random((7, 4), np.float32)
  order = np.argsort(-scores)  # a detector gives its rows in this order
  given = picture(detection_features=rows[order], detection_boxes=boxes[order])
  # The second picture has other rows; each picture keeps its best.
  data = Schema("float16", "f", top_k=top_k).encode(record(given, picture(rows=6, seed=6)))
  read, other = Schema("float16", "f").decode(data).pictures
  assert len(other.detection_features) == min(top_k, 6)
  best = [k for k in range(7) if (scores > scores[k]).sum() < top_k]  # fewer than top_k are better
  assert len(read.detection_features) == len(read.detection_boxes) == len(best) == min(top_k, 7)
  for k in best:
    (row,) = np.flatnonzero(np.isclose(read.detection_features, rows[k], rtol=2**-11, atol=2**-25).all(axis=1))
    np.testing.assert_allclose(read.detection_boxes[row], boxes[k], atol=8e-6)
  np.testing.assert_array_equal(read.boxes, given.boxes)  # objects are not rows


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_measured_as_a_reader_sees_it(dtype, top_k):
  """Against sums over what was read, one row after the other."""
  schema, given = Schema(dtype, "f", top_k=top_k), record(picture(3, 5), picture(1, 4, seed=2))
  given.pictures[0].detection_features[1] = 0
  data = schema.encode(given)
  stored = schema.features.deserialize_example_np(data)
  pairs = []
  for before, after in zip(given.pictures, schema.decode(data).pictures, strict=True):
    pairs += zip(before.detection_features, after.detection_features)
    pairs += zip(before.mask_features, after.mask_features)
  values = errors = cosines = 0.0
  for before, after in ((a.astype(np.float64), b.astype(np.float64)) for a, b in pairs):
    values, errors = values + np.dot(before, before), errors + np.dot(after - before, after - before)
    cosines += np.dot(before, after) / np.linalg.norm(before) / np.linalg.norm(after) if before.any() else 1.0
  sums = schema.measure(given)
  assert sums.feature_rows == len(pairs) == 3 + (top_k or 5) + 1 + (top_k or 4)
  np.testing.assert_allclose(sums.squared_values, values, rtol=1e-9)
  np.testing.assert_allclose(sums.squared_errors, errors, rtol=1e-9)
  np.testing.assert_allclose(sums.cosines, cosines, rtol=1e-9)
  assert sums.feature_bytes == sum(stored[name].nbytes for name in (
      "detection_features", "detection_scales", "detection_boxes", "mask_features", "mask_scales"))


def test_what_a_type_costs_in_exactness():
  """Of Gaussian features, whose errors are known: a rounding step of width w has a variance of w^2 / 12."""
  errors = {dtype: Schema(dtype, "f").measure(record(picture(rows=200))) for dtype in FEATURE_DTYPES}
  assert 1e-4 < errors["float16"].relative_rmse < 2.5e-4 and 1e-3 < errors["bfloat16"].relative_rmse < 2e-3
  largest = 2.9  # of 256 values, on average, in standard deviations
  assert errors["int8"].relative_rmse == pytest.approx(largest / 127 / 12**0.5, rel=0.1)
  assert all(1 - sums.relative_rmse**2 < sums.mean_cosine <= 1 for sums in errors.values())


def test_int8_keeps_a_row_of_zeros():
  schema = Schema("int8", "f")
  read = schema.decode(schema.encode(record(picture(detection_features=np.zeros((5, 256), np.float32)))))
  assert not read.picture.detection_features.any()


def test_equal_records_are_equal_bytes():
  # In another process, since Protobuf orders the fields of a message by chance, but alike within a process.
  code = "import sys, test_export_record as t; " \
         "sys.stdout.buffer.write(t.Schema('int8', 'f').encode(t.record(t.picture(), t.picture(2))))"
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
  other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=60)
  assert other.stdout == Schema("int8", "f").encode(record(picture(), picture(2)))


@pytest.mark.parametrize("changes, message", [
    ({"scores": np.zeros(2, np.float32)}, "scores has shape (2,), expected (3,)"),
    ({"boxes": np.full((3, 4), np.nan, np.float32)}, "boxes holds a value that is not finite"),
    ({"mask_areas": np.zeros((3, 1), np.float32)}, "mask_areas has shape (3, 1), expected (3,)"),
    ({"text_boxes": np.zeros(4, np.float32)}, "text_boxes has shape (4,), expected (4, 4)"),
    ({"image": b""}, "it has no bytes; a record of text alone has no picture"),
    ({"mask_rles": (b"x",)}, "3 objects, but 1 mask_rles: have the segmenter give them, or do not ask for them in "
                             "config.features")])
def test_encode_refuses_a_picture(changes, message):
  """And names it."""
  with pytest.raises(RecordError) as error:
    Schema("int8", "f", OPTIONAL_FIELDS).encode(record(picture(), picture(**changes)))
  assert str(error.value) == f"record 7: picture 1: {message}"


@pytest.mark.parametrize("conversation, message", [
    (Conversation("x", (Turn(ASSISTANT, "a"),)), "turns must alternate user, assistant; got ['assistant']"),
    (talk("<image 1> and <image 2>", "a"), "<image 2> but only 2 pictures"),
    (talk("q", "<box 1.1> <box 0.2>"), "<box 0.2> but only 2 text boxes in picture 0"),
    (talk("q", "<box 2.0>"), "<box 2.0> but only 2 pictures"),
    (talk("q", "<box 1>"), "<box 1> names no picture: write <box 0.1>")])
def test_encode_refuses_texts(conversation, message):
  with pytest.raises(RecordError) as error:
    Schema("int8", "f").encode(record(picture(), picture(), conversations=(conversation,)))
  assert str(error.value) == f"record 7: {message}"


def test_texts_point_at_any_picture_and_box():
  check(record(picture(), picture(), conversations=(talk("<image 0><image 1>?", "<box 1.1> <box 0.0> in <image 1>"),)))
  check(text_only())


def test_what_the_index_says():
  schema = Schema("int8", "f")
  item = schema.item(record(picture(), picture()))
  assert (item.conversations, item.pictures) == (4, 2)  # two conversations and two captions
  assert item.payload == schema.encode(record(picture(), picture()))
  assert item.features == schema.measure(record(picture(), picture()))
  assert (schema.item(text_only()).pictures, schema.measure(text_only()).feature_bytes) == (0, 0)


def test_decode_refuses_another_fingerprint_and_noise():
  data = Schema("int8", "aaa").encode(record())
  with pytest.raises(RecordError, match="^record was made by refiner aaa, its manifest says bbb: export again$"):
    Schema("int8", "bbb").decode(data)
  with pytest.raises(RecordError, match="^not a record of schema 2: [^\n]*$"):
    Schema("int8", "aaa").decode(b"noise")


@pytest.mark.parametrize("version", [0, 1, 3])
def test_decode_refuses_another_version_whatever_its_fields(version, monkeypatch):
  other = tfds.features.FeaturesDict({"schema_version": tfds.features.Scalar(np.int32), "new": tfds.features.Text()})
  monkeypatch.setattr(schema_module, "SCHEMA_VERSION", version)
  same_fields = Schema("int8", "aaa").encode(record())
  monkeypatch.undo()
  for data in (other.serialize_example({"schema_version": version, "new": "x"}), same_fields):
    with pytest.raises(RecordError, match=f"^record has schema version {version}, its manifest says 2: export again$"):
      Schema("int8", "aaa").decode(data)


def test_unknown_type_and_field():
  with pytest.raises(UserError, match="^features.dtype: expected one of .*'float16', .*'int8'.*, got 'float8'$"):
    Schema("float8", "f")
  with pytest.raises(UserError, match="^records have a field mask_colours, unknown to this program: update it$"):
    Schema("int8", "f", ("mask_areas", "mask_colours"))


def test_fingerprint_ignores_order_only():
  assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
