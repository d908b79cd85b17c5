"""Large JSON files entry by entry: what json.loads gives, whatever the window, in little memory."""

import json
import random
import tracemalloc

import pytest
from etils import epath

from refiner_export.common.settings import UserError
from refiner_export.sources import json_entries
from refiner_export.sources.coco import Coco
from refiner_export.sources.json_entries import Places, entries

TEXTS = ["", "a", "caf\u00e9", "\U0001f600", "]}\\\"{[", "\u2028", "\ud83d", "x" * 40, "\0"]


def value(draw: random.Random, depth: int = 0):
  kind = draw.randrange(8 if depth < 3 else 5)
  if kind < 5:
    return draw.choice([draw.choice(TEXTS), draw.randrange(-9, 10**12), draw.random(), None, True])
  if kind == 5:
    return {draw.choice(TEXTS): value(draw, depth + 1) for _ in range(draw.randrange(3))}
  return [value(draw, depth + 1) for _ in range(draw.randrange(3))]


@pytest.mark.parametrize("seed", range(60))
def test_entries_are_those_of_the_whole_file(seed, tmp_path, monkeypatch):
  draw, path = random.Random(seed), epath.Path(tmp_path / "file.json")
  monkeypatch.setattr(json_entries, "_WINDOW", draw.choice([1, 2, 7, 64, 1 << 22]))
  tree = {}
  for name in draw.sample(["a", "b", "info", "n", "c"], 5):
    tree[name] = value(draw)
    if name in "abc":
      tree[name] = [{"id": k, "value": value(draw)} for k in range(draw.randrange(4))]
  text = json.dumps(tree, ensure_ascii="\\ud83d" in json.dumps(tree), indent=draw.choice([None, 1]))
  path.write_bytes(draw.choice([b"", b"\xef\xbb\xbf"]) + text.encode("utf-8", "surrogatepass") + b" \n")
  found = {name: [] for name in "abc"}
  places = Places(path)
  for entry in entries(path, "field", ("a", "b", "c")):
    assert entry.number == len(found[entry.array])
    assert places.parse(entry.start, entry.stop) == entry.fields
    found[entry.array].append(entry.fields)
  assert found == {name: tree[name] for name in "abc"}


@pytest.mark.parametrize("window", [1, 1 << 22])
def test_a_file_that_is_cut_short_anywhere(tmp_path, monkeypatch, window):
  monkeypatch.setattr(json_entries, "_WINDOW", window)
  text = json.dumps({"info": 12.5, "a": [{"id": 1, "text": "caf\u00e9"}, {"id": 2}], "z": [1, 2]}, ensure_ascii=False)
  data, path = text.encode(), epath.Path(tmp_path / "file.json")
  for length in range(len(data)):
    path.write_bytes(data[:length])
    with pytest.raises(UserError, match=f"^field: {path}"):
      list(entries(path, "field", ("a",)))


def test_a_plan_takes_less_memory_than_the_file(tmp_path):
  draw, size = random.Random(0), 1_000
  images = [{"id": k, "file_name": f"{k:012d}.jpg", "width": 640, "height": 480} for k in range(size)]
  captions = [{"id": k, "image_id": k % size, "caption": f"caption {k}"} for k in range(5 * size)]
  objects = [{"id": k, "image_id": draw.randrange(size), "category_id": 1, "bbox": [1.5, 2.5, 30.5, 40.5],
              "segmentation": [[draw.uniform(0, 480) for _ in range(60)]]} for k in range(7 * size)]
  for name, tree in ("captions", {"images": images, "annotations": captions}), (
      "instances", {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": objects}):
    (tmp_path / f"{name}.json").write_text(json.dumps(tree))
  source = Coco(str(tmp_path), str(tmp_path / "captions.json"), str(tmp_path / "instances.json"))
  tracemalloc.start()
  (unit,) = source.shards()
  kept, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  large = (tmp_path / "instances.json").stat().st_size
  assert large > 8 << 20 and kept < large / 10 and peak < large / 1.5
  (example,) = source.read_slice(unit, 234, 235)
  assert example.id == "234" and example.captions == tuple([f"caption {k}" for k in range(234, 5 * size, size)])
