"""A tiny COCO set, and an export of it, that the tests of the exporter share."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from refiner_export.export import fetching, pipeline
from refiner_export.export.config import ExportConfig
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.export.run import export
from refiner_export.sources.coco import Coco

WIDTH, HEIGHT = 80, 60
UNREADABLE = 4  # the id of the picture that is no picture


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
  """Nobody waits between two tries to read a picture."""
  monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.001)


@pytest.fixture
def refined(monkeypatch):
  """The ids of the examples that go through the refiner while a test runs."""
  ids, refine = [], pipeline.refine_read

  def counted(examples, *arguments):
    ids.extend([example.id for example in examples])
    return refine(examples, *arguments)

  monkeypatch.setattr(pipeline, "refine_read", counted)
  return ids


def write_coco(folder: pathlib.Path) -> Coco:
  """Five pictures of 80x60: objects with a polygon, both kinds of RLE, a crowd; picture 4 is a text file."""
  (folder / "images").mkdir(parents=True)
  generator = np.random.default_rng(0)
  images = [{"id": k, "file_name": f"{k}.jpg", "width": WIDTH, "height": HEIGHT} for k in (5, 1, 2, 3, 4)]
  for image in images:
    pixels = generator.integers(0, 255, (HEIGHT // 4, WIDTH // 4, 3), np.uint8)
    Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(folder / "images" / image["file_name"])
  (folder / "images" / f"{UNREADABLE}.jpg").write_text("no picture")
  square = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
  square[10:30, 20:50] = 1
  compressed = coco_mask.encode(square)
  compressed["counts"] = compressed["counts"].decode()
  runs = {"size": [HEIGHT, WIDTH], "counts": _runs(square)}
  polygon = [[20, 10, 50, 10, 50, 30, 20, 30]]
  box = [20, 10, 30, 20]
  rows = [  # image, category, segmentation, iscrowd
      (1, 1, polygon, 0), (1, 2, compressed, 0), (1, 2, runs, 0),   # the cat is unique, the dogs are not
      (2, 1, polygon, 0), (2, 1, runs, 1),                          # one cat beside a crowd of cats
      (3, 2, [], 0)]
  instances = {"images": images, "categories": [{"id": 1, "name": "Cat"}, {"id": 2, "name": "dog"}],
               "annotations": [
                   {"id": k, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd,
                    "segmentation": segmentation} for k, (image, category, segmentation, crowd) in enumerate(rows)]}
  captions = {"images": images, "annotations": [
      {"id": k, "image_id": image["id"], "caption": f" caption {part} of {image['id']}\n"}
      for k, (image, part) in enumerate((image, part) for image in images for part in "ab")]}
  (folder / "captions.json").write_text(json.dumps(captions))
  (folder / "instances.json").write_text(json.dumps(instances))
  return Coco(str(folder / "images"), str(folder / "captions.json"), str(folder / "instances.json"))


def _runs(mask: np.ndarray) -> list[int]:
  """Uncompressed run lengths, column by column, beginning with zeros."""
  flat = mask.flatten(order="F")
  edges = np.flatnonzero(np.diff(flat)) + 1
  return np.diff([0, *edges, len(flat)]).tolist()


def make_config(source: Coco, output: pathlib.Path, **changes) -> ExportConfig:
  config = ExportConfig(**{"output": str(output), "source": source, "refiner": ClassicalRefiner(grid=4),
                           "records_per_shard": 2, **changes})
  config.finalize()
  return config


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Coco:
  return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def finished(coco, tmp_path_factory) -> pathlib.Path:
  """A finished export: 4 records in 3 shards, one picture skipped. Not to be changed: copy it."""
  output = tmp_path_factory.mktemp("export") / "records"
  export(make_config(coco, output))
  return output


@pytest.fixture(scope="session")
def make():
  return make_config
