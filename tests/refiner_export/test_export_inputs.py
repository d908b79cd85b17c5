"""Sources that are edited between two runs: whatever reaches a record is noticed, and what was edited is named."""

import dataclasses
import functools
import json
import os
import shutil

import numpy as np
import pytest
from odd_sources import png

from refiner_export.common.settings import UserError
from refiner_export.export.run import ShardRange, export
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture
from refiner_export.sources.coco import Coco
from refiner_export.sources.source import SourceSettings, Unit


@dataclasses.dataclass(unsafe_hash=True)
class Drawn(SourceSettings):
  """One picture with a mask, whose side in pixels is all that differs."""
  name = "drawn"

  def shards(self) -> list[Unit]:
    return [Unit("all", 1, "1")]

  def read(self, unit: Unit):
    mask = np.zeros((8, 12), bool)
    mask[:SIDE[0]] = True
    thing = SourceObject("cat", (0.0, 0.0, 0.5, 0.5), functools.partial(np.copy, mask))
    yield SourceExample("a", (SourcePicture(functools.partial(png, 1), (thing,)),))


SIDE = [3]


@pytest.fixture
def own(coco, tmp_path) -> Coco:
  """A copy of the tiny COCO set that a test may edit."""
  folder = shutil.copytree(os.path.dirname(coco.images), tmp_path / "coco")
  return Coco(*[str(folder / name) for name in ("images", "captions.json", "instances.json")])


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def replace(path: str, old: str, new: str) -> None:
  with open(path) as file:
    text = file.read()
  assert old in text
  with open(path, "w") as file:
    file.write(text.replace(old, new))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("file, old, new", [
    ("captions", "caption b", "heading b"), ("instances", "Cat", "Owl"), ("instances", "[[20, 10, 50", "[[20, 10, 49"),
    ("instances", "[20, 10, 30, 20]", "[20, 10, 30, 21]")])
def test_an_edited_annotation_file_is_named(own, make, tmp_path, file, old, new, whole):
  config = make(own, tmp_path / "out")
  export(config, ShardRange() if whole else ShardRange(0, 1))
  before = contents(tmp_path / "out")
  replace(getattr(own, file), old, new)
  with pytest.raises(UserError, match=f"^{tmp_path / 'out'} was begun with another config.source: edited since: {file} "
                                      "of captions.json: remove the directory or name another output$"):
    export(config)
  assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("is_as_large", [True, False])
def test_an_edited_picture_is_noticed(own, make, tmp_path, whole, is_as_large):
  config, picture = make(own, tmp_path / "out"), f"{own.images}/1.jpg"
  export(config, ShardRange() if whole else ShardRange(0, 1))
  before, stat = contents(tmp_path / "out"), os.stat(picture)
  with open(picture, "r+b" if is_as_large else "ab") as file:
    file.write(b"\xff\xd8")
  os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9 * is_as_large))
  with pytest.raises(UserError, match=f"^{tmp_path / 'out'}: pictures of .*-00000-of-00003 were edited since"):
    export(config)
  assert contents(tmp_path / "out") == before


def test_pictures_that_went_away_or_that_no_shard_has_yet_do_no_harm(own, make, tmp_path):
  config = make(own, tmp_path / "out")
  export(config, ShardRange(0, 1))
  os.utime(f"{own.images}/5.jpg", ns=(0, 0))  # of shard 2, which is still to be made
  manifest = export(config)
  shutil.rmtree(own.images)
  os.mkdir(own.images)
  assert export(config) == manifest
  assert json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"][0]["pictures_version"]


def test_an_edited_mask_of_a_source_that_says_nothing_of_it(make, tmp_path):
  """Its units and its texts are those of before."""
  config = make(Drawn(), tmp_path / "out")
  manifest = export(config)
  shard = tmp_path / "out" / manifest.shards[0].file
  shard.unlink()
  SIDE[0] = 4
  try:
    with pytest.raises(UserError, match="texts or annotations of .* are not those of before"):
      export(config)
  finally:
    SIDE[0] = 3
  assert export(config) == manifest and shard.exists()
