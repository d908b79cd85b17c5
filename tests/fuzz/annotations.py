"""Damaged annotations of every source: each annotation is exported right, counted as left out, or refused in one line.

A child process runs the cases, because a library that is written in C can end its process.
"""

import collections
import copy
import functools
import io
import json
import math
import os
import pathlib
import random
import re
import select
import subprocess
import sys
import traceback

import numpy as np
from PIL import Image

from refiner_export.common.images import UnreadableImage
from refiner_export.common.settings import UserError
from refiner_export.export import pipeline
from refiner_export.export.cleaning import clean
from refiner_export.export.config import ImageSettings
from refiner_export.records.record import BOX_PLACEHOLDER, Conversation, Turn
from refiner_export.records.schema import Schema
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture
from refiner_export.sources.coco import Coco
from refiner_export.sources.photos import Photos

FULL, SMALL = 1_000, 60  # cases of every source
_PATIENCE = 30  # seconds for one case
_WIDTH, _HEIGHT = 24, 16
_SCHEMA = Schema("float16", "fuzz")
_REFINER = ClassicalRefiner(grid=1).build()
_IMAGE = ImageSettings(max_side=32, quality=50)

_PLACEHOLDER = re.compile(r"<(image|box) \d")
_NUMBERS = [0, -1, 1, 7, 0.5, -3.25, 1e9, 1e308, -1e308, 10**30, 10**400, math.nan, math.inf, True, 2**31, 2**63]
_TEXTS = ["", " ", "<box 0>", "<box 0.0> and <image 9>", "<image 0>", "\ud800", "a\0b", "x" * 5000, "1", "01", "\u202e",
          "../secret.png", "out.png", "1.png/", "/etc/hostname", "NaN",
          "caf\u00e9 \U0001f600", "<box 99999999999999999.1>", "see <image 0>", "a <box 1>", "<box 0.0>"]
_NESTED = [None, [], {}, [[]], [None], [[1, 2]], [[1, 2, 3, 4]], [[1, 1, 5, 1, 9, 1]], {"counts": [], "size": []},
           [["a"] * 6], {"a": {"b": [1]}}, [[1e9, 1e9] * 4], [[math.nan] * 6], [[0, 0, 9, 0, 9, 9], [3]]]
_CODES = ["", "0", "PPP", "o" * 400, "\x7f" * 40, "~" * 9, "1" * 200, "\ud800", "PPYo0N2", "\u00e9"]


# --- COCO ---


def write_coco(folder: pathlib.Path, draw: random.Random) -> tuple[Coco, dict, dict]:
  """Four pictures, one of which is stored turned; a picture and a link that lie outside of the folder's reach."""
  (folder / "images").mkdir(parents=True, exist_ok=True)
  images = []
  for number in range(1, 5):
    pixels = np.random.default_rng(number).integers(0, 255, (_HEIGHT, _WIDTH, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6 if number == 2 else 1
    Image.fromarray(pixels).save(folder / "images" / f"{number}.png", exif=exif)
    images.append({"id": number, "file_name": f"{number}.png", "width": _WIDTH, "height": _HEIGHT})
  Image.new("RGB", (_WIDTH, _HEIGHT), "red").save(folder / "secret.png")
  if not os.path.lexists(folder / "images" / "out.png"):
    os.symlink(folder / "secret.png", folder / "images" / "out.png")
  square = [[4, 3, 14, 3, 14, 11, 4, 11]]
  shapes = [square, [], {"size": [_HEIGHT, _WIDTH], "counts": [40, 9, _HEIGHT * _WIDTH - 49]}, square]
  objects, captions = [], []
  for number in range(10):
    objects.append({"id": number, "image_id": 1 + number % 4, "category_id": 1 + number % 3, "bbox": [4, 3, 10, 8],
                    "iscrowd": int(number == 7), "segmentation": shapes[number % 4]})
    captions.append({"id": number, "image_id": 1 + number % 4, "caption": f"caption {number} of it"})
  categories = [{"id": number, "name": name} for number, name in enumerate(("cat", "dog", "tree"), 1)]
  source = Coco(*[str(folder / name) for name in ("images", "captions.json", "instances.json")])
  return source, {"images": images, "annotations": captions}, {
      "images": images, "categories": categories, "annotations": objects}


def damage_tree(tree: dict, draw: random.Random) -> None:
  """Replaces, removes or repeats something at a random place."""
  place = tree
  while True:
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not keys:
      return
    key = draw.choice(keys)
    inner = place[key]
    if isinstance(inner, (dict, list)) and inner and draw.random() < 0.85:
      place = inner
      continue
    kind = draw.choice(["replace", "replace", "replace", "remove", "repeat"])
    if kind == "replace":
      place[key] = _hostile(key, draw)
    elif kind == "remove":
      del place[key]
    elif isinstance(place, list):
      place.insert(0, copy.deepcopy(inner))
    return


def _hostile(key: object, draw: random.Random):
  if key == "segmentation" and draw.random() < 0.7:
    if draw.random() < 0.5:
      size = draw.choice([[_HEIGHT, _WIDTH], [_WIDTH, _HEIGHT], [10**6, 10**6], [0, 0], None])
      runs = [draw.choice([0, 5, 40, -1, 2**40, 384]) for _ in range(draw.randrange(6))]
      return {"size": size, "counts": draw.choice([draw.choice(_CODES), runs])}
    scale = draw.choice([1, 20, 200, 1e7])
    count = draw.choice([4, 5, 6, 8, 40, 20000])
    return [[draw.uniform(-scale, scale) for _ in range(count)]]
  if key in ("width", "height") and draw.random() < 0.5:
    return draw.choice([_WIDTH, _HEIGHT, 100])
  if key in ("caption", "name", "file_name", "tag", "question", "answer") and draw.random() < 0.7:
    return draw.choice(_TEXTS)
  return copy.deepcopy(draw.choice(draw.choice([_NUMBERS, _TEXTS, _NESTED])))


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
  kind, where = draw.randrange(6), draw.randrange(len(data))
  if kind == 0:
    return data[:where]
  if kind == 1:
    return data[:where] + bytes([draw.randrange(256)]) + data[where + 1:]
  if kind == 2:
    return data.decode().encode(draw.choice(["utf-16", "utf-8-sig", "utf-32"]), "replace")
  if kind == 3:
    return data + draw.choice([b"}", b"null", b" \n", b"\0"])
  if kind == 4:
    return draw.choice([b"", b"[]", b"null", b"{}", b"[" * 100_000, b'{"images": ' + b"[" * 100_000, data * 2])
  return data[:where] + data[where + draw.randrange(1, 30):]


def coco_case(folder: pathlib.Path, draw: random.Random) -> str:
  source, captions, instances = write_coco(folder, draw)
  trees = {"captions.json": captions, "instances.json": instances}
  if draw.random() < 0.8:
    for _ in range(draw.choice([1, 1, 2, 4])):
      damage_tree(trees[draw.choice(list(trees))], draw)
  for name, tree in trees.items():
    data = json.dumps(tree, ensure_ascii="\\ud800" in json.dumps(tree) or draw.random() < 0.5).encode()
    if draw.random() < 0.15:
      data = damage_bytes(data, draw)
    (folder / name).write_bytes(data)
  source.finalize("source")
  (unit,) = source.shards()
  examples = list(source.read(unit))
  trees = {name: json.loads((folder / name).read_bytes()) for name in trees}
  _check_sum("caption", trees["captions.json"]["annotations"], examples, source.unmatched(unit))
  _check_sum("object", trees["instances.json"]["annotations"], examples, source.unmatched(unit))
  return export(examples)


def _check_sum(kind: str, annotations: list, examples: list[SourceExample], unmatched: dict) -> None:
  """Every annotation is in an example, or is counted."""
  found = sum(count for reason, count in unmatched.items() if reason.startswith(kind))
  crowds = sum(bool(entry.get("iscrowd")) for entry in annotations) if kind == "object" else 0
  for example in examples:
    cleaned = clean(example)
    found += sum(reason.startswith(kind) for reason in cleaned.dropped)
    found += len(cleaned.captions) if kind == "caption" else len(cleaned.pictures[0].objects)
  lost_crowds = sum(count for reason, count in unmatched.items() if reason.startswith(kind)) and crowds
  assert len(annotations) - crowds <= found <= len(annotations) - crowds + lost_crowds, f"{kind}s vanished"


# --- photos of packages ---


def photos_case(folder: pathlib.Path, draw: random.Random) -> str:
  packaged = pathlib.Path(sys.modules[Photos.__module__].__file__).parent / "photos.json"
  photos = json.loads(packaged.read_bytes())[:2]
  if draw.random() < 0.85:
    for _ in range(draw.choice([1, 1, 2, 4])):
      damage_tree(draw.choice(photos) if photos else photos, draw)
  data = json.dumps(photos).encode()
  if draw.random() < 0.15:
    data = damage_bytes(data, draw)
  (folder / "photos.json").write_bytes(data)
  source = Photos(str(folder / "photos.json"))
  (unit,) = source.shards()
  return export(list(source.read(unit)))


# --- a source that somebody has written ---


def own_case(folder: pathlib.Path, draw: random.Random) -> str:
  """Examples whose every field may be hostile; only their types are those of the dataclasses."""
  examples = []
  for number in range(2):
    box = (0.1, 0.2, 0.6, 0.7)
    objects = tuple([SourceObject(_mixed("cat", draw), _mixed_box(box, draw), _mixed_mask(draw)) for _ in range(2)])
    size = draw.choice([None, (_WIDTH, _HEIGHT), (_HEIGHT, _WIDTH), (1, 1)])
    picture = SourcePicture(functools.partial(_png, _WIDTH, _HEIGHT), objects, (_mixed_box(box, draw),),
                            _mixed("somebody", draw), size)
    turns = (Turn("user", _mixed("where <image 0>?", draw)), Turn("assistant", _mixed("<box 0.0>", draw)))
    talk = Conversation(_mixed("rec", draw), turns[:draw.choice([0, 1, 2, 2, 2, 2])])
    examples.append(SourceExample(_mixed(f"example {number}", draw), (picture,), (_mixed("a caption", draw),), (talk,)))
  return export(examples)


def _mixed(good: str, draw: random.Random):
  return good if draw.random() < 0.8 else draw.choice(draw.choice([_TEXTS, _NUMBERS, _NESTED]))


def _mixed_box(box: tuple, draw: random.Random):
  if draw.random() < 0.8:
    return box
  return draw.choice([box[:3], box[::-1], (0, 0, 0, 0), tuple(draw.choices(_NUMBERS, k=4)), None, "abcd", (2, 2, 3, 3)])


def _mixed_mask(draw: random.Random):
  shape = draw.choice([(_HEIGHT, _WIDTH), (5, 5), (0, 0), (3,), ()])
  mask = np.full(shape, draw.choice([True, True, False]))
  return draw.choice([None, functools.partial(np.copy, mask), functools.partial(np.float32, 1.5),
                      functools.partial(int, "x")])


def _png(width: int, height: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (width, height), "green").save(file, "PNG")
  return file.getvalue()


# --- what holds for all of them ---


def export(examples: list[SourceExample]) -> str:
  """Makes records of the examples, and looks at them. Raises `AssertionError` for a record that is wrong."""
  records = 0
  cleaned = [clean(example) for example in examples]
  for example, result in zip(cleaned, pipeline.refine(cleaned, _REFINER, _IMAGE, "fuzz")):
    if isinstance(result, UnreadableImage):
      assert "\n" not in result.reason and result.reason
      continue
    record = _SCHEMA.decode(_SCHEMA.encode(result))
    records += 1
    assert record.id == example.id and record.captions == example.captions
    for caption in record.captions:
      assert caption.strip() and not _PLACEHOLDER.search(caption), "a text from outside points at something"
    for picture in record.pictures:
      assert not (picture.width, picture.height) == (1, 1)
      image = np.asarray(Image.open(io.BytesIO(picture.image)))
      assert not ((image[..., 0] > 200) & (image[..., 1] < 60)).all(), "a picture from outside of the folder"
      boxes = picture.boxes
      assert ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, :2] < boxes[:, 2:]).all()
      assert all(tag.strip() for tag in picture.tags)
    for conversation in record.conversations:
      for turn in conversation.turns:
        for number, box in BOX_PLACEHOLDER.findall(turn.text):
          left, top, right, bottom = record.pictures[int(number)].text_boxes[int(box)]
          assert left < right and top < bottom
  return "exported" if records else "skipped"


SOURCES = {"coco": coco_case, "photos": photos_case, "own": own_case}


def damaged_annotations(seed: int, count: int) -> list[tuple[str, int]]:
  """The cases: a source and a seed for each, `count` of every source."""
  return [(name, seed * 1_000_003 + number) for number in range(count) for name in SOURCES]


def run_case(name: str, seed: int, folder: pathlib.Path) -> str:
  """How a case ends. Prints a case that ends badly."""
  try:
    return SOURCES[name](folder, random.Random(seed))
  except Exception as error:
    if isinstance(error, UserError) and "\n" not in str(error):
      return "refused"
    end = "wrong" if isinstance(error, (AssertionError, UserError)) else "traceback"
    print(f"{end}: {name} {seed}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return end


def run(count: int, seed: int, folder: pathlib.Path) -> collections.Counter:
  """Runs `count` cases of every source in `folder`, and says how many ended in which way."""
  cases, ends = damaged_annotations(seed, count), collections.Counter()
  while cases:
    cases = _run_child(cases, folder, ends)
  return ends


def _run_child(cases: list, folder: pathlib.Path, ends: collections.Counter) -> list:
  """Runs cases in a new process until one of them ends it. Returns the cases that are left."""
  child = subprocess.Popen([sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           bufsize=0)
  child.stdin.write(json.dumps(cases).encode())
  child.stdin.close()
  for position, case in enumerate(cases):
    ready, _, _ = select.select([child.stdout], [], [], _PATIENCE)
    end = child.stdout.readline().decode().strip() if ready else ""
    if not end:
      ends["crash" if ready else "hang"] += 1
      print(f"{'crash' if ready else 'hang'}: {case}", file=sys.stderr, flush=True)
      child.kill()
      child.wait()
      return cases[position + 1:]
    ends[end] += 1
  child.wait()
  return []


def _serve(folder: pathlib.Path) -> None:
  for number, (name, seed) in enumerate(json.loads(sys.stdin.buffer.read())):
    place = folder / f"{name}"
    place.mkdir(parents=True, exist_ok=True)
    print(run_case(name, seed, place), flush=True)


if __name__ == "__main__":
  _serve(pathlib.Path(sys.argv[1]))
