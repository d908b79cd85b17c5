"""Whatever was done to a directory, `verify` says which shard and record, and goes on to the end."""

import dataclasses
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from refiner_export.records import verify
from refiner_export.records.formats import open_shard, write_shard
from refiner_export.records.manifest import Manifest, shard_name
from refiner_export.records.masks import decode_rle
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import OPTIONAL_FIELDS, Picture, Record
from refiner_export.records.schema import Schema
from refiner_export.records.shard_files import ShardItem, index_path

SHARD = "lyrics_records-train.tfrecord-{:05d}-of-00003"


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / "copy")


def problems(directory) -> list[str]:
  """Without the path, which every line begins with."""
  found = list(verify.verify(directory, threads=2))
  assert all(line.startswith(f"{directory}") and "\n" not in line for line in found), found
  return [line.removeprefix(f"{directory}/") for line in found]


def jpeg(width: int, height: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (width, height), "red").save(file, "JPEG")
  return file.getvalue()


def with_picture(record: Record, **changes) -> Record:
  """The record, with its only picture changed."""
  return dataclasses.replace(record, pictures=(dataclasses.replace(record.picture, **changes),))


def rewrite(directory, number: int, change, count: int = 1) -> None:
  """Writes a shard anew, whose first `count` records went through `change`, with a manifest that knows of it."""
  records = RecordDirectory(directory)
  manifest, start = records.manifest, sum(shard.records for shard in records.manifest.shards[:number])
  changed = [records[start + k] for k in range(manifest.shards[number].records)]
  changed[:count] = [change(record) for record in changed[:count]]
  schema = manifest.schema()
  shard = write_shard(directory / manifest.shards[number].file,
                      [schema.item(record) for record in changed])
  shards = [*manifest.shards[:number], shard, *manifest.shards[number + 1:]]
  totals = {name: sum(getattr(shard, name) for shard in shards) for name in ("conversations", "pictures")}
  dataclasses.replace(manifest, shards=tuple(shards), **totals).save(directory)


def test_a_good_directory(finished):
  done = []
  assert list(verify.verify(finished, threads=3, advance=done.append)) == []
  assert sum(done) == Manifest.load(finished).records


@pytest.mark.parametrize("position", range(0, 60000, 3000))
def test_a_damaged_byte(copy, position):
  shard = copy / SHARD.format(0)
  data = shard.read_bytes()
  position %= len(data)
  shard.write_bytes(data[:position] + bytes([data[position] ^ 64]) + data[position + 1:])
  digest, damaged = problems(copy)
  assert digest.startswith(f"{shard.name}: sha256 ")
  record = next(k for k, (start, length, *_) in enumerate(np.load(index_path(shard))) if position < start + length + 16)
  assert damaged.startswith(f"{shard.name}: record {record}: has a bad ")


def test_files_that_are_missing_or_too_many(copy):
  (copy / SHARD.format(0)).unlink()
  index_path(copy / SHARD.format(1)).unlink()
  data = (copy / SHARD.format(2)).read_bytes()
  (copy / SHARD.format(2)).write_bytes(data[:-1])
  (copy / shard_name(0, 2)).write_bytes(data)
  found = problems(copy)
  assert [line.split(":")[0] for line in found] == [
      SHARD.format(0), SHARD.format(1) + ".index", SHARD.format(2), shard_name(0, 2)]
  for line, part in zip(found, ("is missing", "index is missing", "cut short", "not in the manifest: remove it")):
    assert part in line


@pytest.mark.parametrize("change, problem", [
    (dict(boxes=np.array([[0, 0, 1.5, 1]] * 3, np.float32)), "boxes[0] is not in [0, 1]: [0.0, 0.0, 1.5, 1.0]"),
    (dict(boxes=np.array([[0.5, 0, 0.25, 1]] * 3, np.float32)),
     "boxes[0] has its corners in the wrong order: [0.5, 0.0, 0.25, 1.0]"),
    (dict(scores=np.array([0.5, 0.25, 0.75], np.float32)), "scores are not in descending order: [0.5, 0.25, 0.75]"),
    (dict(image=b"no picture"), "its image cannot be decoded: not a JPEG"),
    (dict(image=jpeg(80, 60)[:-50]), "its image cannot be decoded: image file is truncated"),
    (dict(image=jpeg(60, 80)), "its image is of 60x80 pixels, the record says 80x60"),
    (lambda picture: dict(detection_features=picture.detection_features[:3],
                          detection_boxes=picture.detection_boxes[:3]),
     "3 detector rows, the manifest says 16")])
def test_a_wrong_picture(copy, change, problem):
  def changed(picture: Picture) -> Picture:
    return dataclasses.replace(picture, **(change(picture) if callable(change) else change))

  # The record gets another picture, which is right: the line names the wrong one.
  rewrite(copy, 0, lambda record: dataclasses.replace(record, pictures=(record.picture, changed(record.picture))))
  found = problems(copy)
  assert found[0].startswith(f"{SHARD.format(0)}: record 0: picture 1: {problem}")
  assert len(found) == (3 if "boxes" in problem else 1)  # every box of the picture is wrong


def test_an_id_that_is_there_twice(copy):
  rewrite(copy, 0, lambda record: dataclasses.replace(record, id="5"))
  assert problems(copy) == [f"{SHARD.format(2)}: record 0: id '5' is that of record 0 of {SHARD.format(0)} too"]


def test_placeholders_without_what_they_point_at(copy):
  """The encoder refuses such a record, so the bytes are changed afterwards; the index and the CRC fit."""
  path = copy / SHARD.format(0)
  shard = open_shard(path)
  payloads = [shard.read(k) for k in range(len(shard))]
  assert payloads[0].count(b"<box 0.0>") == 1
  payloads[0] = payloads[0].replace(b"<box 0.0>", b"<box 0.7>")
  counts = zip(payloads, shard.conversation_counts.tolist(), shard.picture_counts.tolist())
  manifest = Manifest.load(copy)
  info = write_shard(path, [ShardItem(*values) for values in counts])
  dataclasses.replace(manifest, shards=(info, *manifest.shards[1:])).save(copy)
  assert problems(copy) == [f"{path.name}: record 0: record 1: <box 0.7> but only 1 text boxes in picture 0"]


def test_what_a_record_may_lack(copy):
  """Text alone, or boxes without area."""
  rewrite(copy, 0, lambda record: with_picture(record, boxes=np.zeros((3, 4), np.float32)))
  rewrite(copy, 1, lambda record: dataclasses.replace(record, pictures=(), conversations=()))
  assert problems(copy) == []


def test_numbers_of_the_manifest(copy):
  manifest = Manifest.load(copy)
  wrong = dataclasses.replace(manifest.shards[1], records=2, conversations=7, pictures=9, sha256="abc")
  dataclasses.replace(manifest, shards=(manifest.shards[0], wrong, manifest.shards[2]), skipped=0).save(copy)
  found = problems(copy)
  assert found[0] == f"{SHARD.format(1)}: records 1, the manifest says 2"
  assert found[1] == f"{SHARD.format(1)}: conversations {manifest.shards[1].conversations}, the manifest says 7"
  assert found[2] == f"{SHARD.format(1)}: pictures 1, the manifest says 9"
  assert found[3] == f"{SHARD.format(1)}: sha256 {manifest.shards[1].sha256}, the manifest says abc"
  assert [line.split(": ", 1)[-1] for line in found[4:]] == [
      "the manifest says 4 records, and 5 shard by shard",
      f"the manifest says {manifest.conversations} conversations, and "
      f"{manifest.conversations + 7 - manifest.shards[1].conversations} shard by shard",
      "the manifest says 4 pictures, and 12 shard by shard", "1 skipped examples, the manifest says 0"]


def test_a_record_of_another_refiner(copy):
  manifest = Manifest.load(copy)
  dataclasses.replace(manifest, fingerprint="abc").save(copy)
  found = problems(copy)
  assert len(found) == 4 and found[2].startswith(f"{SHARD.format(1)}: record 0: record was made by refiner ")


@pytest.mark.parametrize("format", ["tfrecord", "array_record"])
def test_masks(tmp_path, finished, format):
  draw = np.random.default_rng(0)
  masks = draw.random((3, 60, 80)) < np.array([0.2, 0.5, 0.0])[:, None, None]
  rles = [coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"] for mask in masks]
  for mask, rle in zip(masks, rles):
    np.testing.assert_array_equal(decode_rle(rle, 60, 80), mask)
  first = RecordDirectory(finished)[0]
  with_masks = with_picture(first, mask_ious=np.ones(3, np.float32), mask_rles=tuple(rles),
                            mask_areas=masks.mean((1, 2)).astype(np.float32))
  damaged = dataclasses.replace(with_picture(with_masks, mask_rles=(rles[1], rles[1][:-4], b"~~~")), id="x")
  original = Manifest.load(finished)
  schema = Schema(original.feature_dtype, original.fingerprint, OPTIONAL_FIELDS)
  shard = write_shard(tmp_path / shard_name(0, 1, format), [schema.item(r) for r in (with_masks, damaged)])
  dataclasses.replace(original, shards=(shard,), records=2, conversations=shard.conversations, pictures=2, skipped=0,
                      format=format, optional_fields=OPTIONAL_FIELDS, files={}).save(tmp_path)
  assert problems(tmp_path) == [f"{shard.file}: record 1: picture 0: {problem}" for problem in (
      f"mask_rles[0] covers {masks[1].mean():.4f} of the picture, mask_areas say {masks[0].mean():.4f}",
      "mask_rles[1]: not a mask of 60 rows and 80 columns", "mask_rles[2]: not a mask of 60 rows and 80 columns")]


def command(*arguments):
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  return subprocess.run([sys.executable, "-m", "refiner_export", "verify", *map(str, arguments)], env=environment,
                        capture_output=True, text=True, timeout=120)


def test_command(finished, copy):
  result = command(finished)
  assert result.returncode == 0
  assert result.stdout.startswith(f"{finished}: no problems in 4 records of 3 tfrecord shards,")
  assert result.stdout.count("\n") == 1 and result.stderr.startswith("4 of 4 records, ")
  rewrite(copy, 1, lambda record: with_picture(record, image=b"x"))
  result = command(copy)
  first, last = result.stdout.splitlines()
  assert result.returncode == 1 and first.endswith("record 0: picture 0: its image cannot be decoded: not a JPEG")
  assert last.startswith(f"{copy}: 1 problem in 4 records")
  result = command("/nowhere")
  assert result.returncode == 2 and result.stderr.startswith("error: no manifest.json in /nowhere: ")


@pytest.mark.parametrize("arguments, message", [
    ([], "DIR is required"), (["x", "--threads=0"], "threads")])
def test_mistakes(arguments, message):
  result = command(*arguments)
  assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
  assert message in result.stderr
