"""The record's schema: what goes in comes out, within the stated tolerance, and wrong records are refused in words."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from refiner_export.record import ASSISTANT, USER, Conversation, Record, RecordError, Schema, Turn, fingerprint


def record(objects=3, rows=5, **changes) -> Record:
  draw = np.random.default_rng(1)
  values = dict(
      id="7", source="test", image=b"\xff\xd8jpeg\x00", height=60, width=80, captions=("one", "zwei \u00e4"),
      conversations=(Conversation("vqa", (Turn(USER, "q"), Turn(ASSISTANT, "a"), Turn(USER, "r"), Turn(ASSISTANT, ""))),
                     Conversation("rec", (Turn(USER, "the cat"), Turn(ASSISTANT, "<box 1>")))),
      text_boxes=draw.random((2, 4), np.float32), tags=tuple(f"tag {k}" for k in range(objects)),
      boxes=draw.random((objects, 4), np.float32), scores=draw.random(objects, np.float32),
      detection_features=draw.normal(size=(rows, 256)).astype(np.float32),
      detection_boxes=draw.random((rows, 4), np.float32),
      mask_features=draw.normal(size=(objects, 256)).astype(np.float32))
  return Record(**{**values, **changes})


# bfloat16 keeps 8 bits of a value; int8 keeps steps of a row's largest value / 127.
@pytest.mark.parametrize("dtype, relative, of_largest", [("bfloat16", 2**-8, 0), ("int8", 0, 0.502 / 127)])
@pytest.mark.parametrize("objects, rows", [(3, 5), (0, 0)])
def test_round_trip(dtype, relative, of_largest, objects, rows):
  schema, original = Schema(dtype, "f" * 12), record(objects, rows)
  read = schema.decode(schema.encode(original))
  for field in dataclasses.fields(Record):
    before, after = getattr(original, field.name), getattr(read, field.name)
    if field.name in ("detection_features", "mask_features"):
      allowed = np.abs(before) * relative + np.abs(before).max(axis=1, keepdims=True, initial=0) * of_largest
      assert after.dtype == np.float32 and after.shape == before.shape
      assert (np.abs(after - before) <= allowed).all()
    elif field.name == "detection_boxes":
      np.testing.assert_allclose(after, before, atol=8e-6)
    elif isinstance(before, np.ndarray):
      np.testing.assert_array_equal(after, before)
    else:
      assert after == before


def test_int8_keeps_a_row_of_zeros():
  schema = Schema("int8", "f")
  read = schema.decode(schema.encode(record(detection_features=np.zeros((5, 256), np.float32))))
  assert not read.detection_features.any()


def test_equal_records_are_equal_bytes():
  # In another process, since Protobuf orders the fields of a message by chance, but alike within a process.
  code = "import sys, test_export_record as t; sys.stdout.buffer.write(t.Schema('int8', 'f').encode(t.record()))"
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
  other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=60)
  assert other.stdout == Schema("int8", "f").encode(record())


@pytest.mark.parametrize("changes, message", [
    ({"scores": np.zeros(2, np.float32)}, "record 7: scores has shape (2,), expected (3,)"),
    ({"boxes": np.full((3, 4), np.nan, np.float32)}, "record 7: boxes holds a value that is not finite"),
    ({"conversations": (Conversation("x", (Turn(ASSISTANT, "a"),)),)},
     "record 7: turns must alternate user, assistant; got ['assistant']"),
    ({"conversations": (Conversation("x", (Turn(USER, "<box 2>"), Turn(ASSISTANT, "a"))),)},
     "record 7: <box 2> but only 2 text boxes")])
def test_encode_refuses(changes, message):
  with pytest.raises(RecordError) as error:
    Schema("int8", "f").encode(record(**changes))
  assert str(error.value) == message


def test_decode_refuses_another_fingerprint_and_noise():
  data = Schema("int8", "aaa").encode(record())
  with pytest.raises(RecordError, match="^record was made by refiner aaa, its manifest says bbb: export again$"):
    Schema("int8", "bbb").decode(data)
  with pytest.raises(RecordError, match="^not a record of schema 1: [^\n]*$"):
    Schema("int8", "aaa").decode(b"noise")


def test_fingerprint_ignores_order_only():
  assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
