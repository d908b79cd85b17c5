"""The classical refiner with faults: how many there are, that they are repeatable, and that features follow them."""

import io

import numpy as np
import pytest
from PIL import Image

from refiner_export.common.boxes import iou
from refiner_export.common.settings import UserError
from refiner_export.export.config import ExportConfig, refiner_from_manifest
from refiner_export.export.run import export
from refiner_export.records.reader import RecordDirectory
from refiner_export.refiners.base import UprightPicture
from refiner_export.refiners.classical.imperfect import ImperfectRefiner
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.scene_shapes import SHAPES
from refiner_export.sources.scenes import Scenes

GRID = 4


def pictures(count: int) -> list[UprightPicture]:
  made = []
  for example in Scenes(count=count, size=48).examples():
    picture = example.pictures[0]
    made.append(UprightPicture(Image.open(io.BytesIO(picture.read())), picture.objects))
  return made


def imperfect(**changes) -> ImperfectRefiner:
  refiner = ImperfectRefiner(**dict(grid=GRID, names=SHAPES) | changes)
  refiner.finalize("refiner")
  return refiner


def refine(refiner, seen):
  tags = refiner.tagger.tag(seen)
  found = refiner.detector.detect(seen, tags)
  return found, refiner.segmenter.segment(seen, found)


def test_without_faults_it_is_the_classical_refiner():
  seen = pictures(4)
  for ours, theirs in zip(refine(imperfect(), seen), refine(ClassicalRefiner(grid=GRID), seen)):
    for one, other in zip(ours, theirs):
      for name in vars(one):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("changes", [dict(missed=0.3), dict(wrong_tags=0.3), dict(jitter=0.1)])
def test_as_many_faults_as_asked_for(changes):
  refiner = imperfect(**changes)
  total = found = wrong = 0
  overlaps = []
  for picture in pictures(150):
    objects = refiner.seen(picture).objects
    total += len(picture.objects)
    found += len(objects)
    if len(objects) == len(picture.objects):
      for true, told in zip(picture.objects, objects):
        wrong += true.tag != told.tag
        overlaps.append(iou([true.box], [told.box])[0])
        assert told.tag in SHAPES and told.mask is true.mask
  assert total > 600
  assert 1 - found / total == pytest.approx(refiner.missed, abs=0.06)
  assert wrong / len(overlaps) == pytest.approx(refiner.wrong_tags, abs=0.06)
  if refiner.jitter:
    assert 0.6 < np.mean(overlaps) < 0.85
  else:
    assert np.mean(overlaps) == 1


def test_faults_depend_on_picture_and_seed_alone():
  seen = pictures(6)
  refiner = imperfect(missed=0.3, jitter=0.2, wrong_tags=0.3)
  first = [refiner.seen(picture).objects for picture in seen]
  assert first == [refiner.seen(picture).objects for picture in reversed(seen)][::-1]
  assert first != [imperfect(missed=0.3, jitter=0.2, wrong_tags=0.3, seed=1).seen(picture).objects for picture in seen]


def test_export_with_faults_and_the_same_refiner_again(tmp_path):
  refiner = imperfect(missed=0.5, jitter=0.1, wrong_tags=0.2)
  config = ExportConfig(output=str(tmp_path / "records"), source=Scenes(count=6, size=48), refiner=refiner)
  config.finalize()
  manifest = export(config)
  again = refiner_from_manifest(manifest)
  assert again == refiner
  directory = RecordDirectory(tmp_path / "records")
  for position, picture in enumerate(pictures(6)):
    record = directory[position]
    assert len(record.picture.tags) == len(record.picture.mask_features) < len(picture.objects) + 1
    assert len(record.picture.detection_features) == GRID * GRID


@pytest.mark.parametrize("changes, message", [
    (dict(missed=1.5), "refiner.missed=1.5 must lie in [0, 1]"),
    (dict(jitter=-0.1), "refiner.jitter=-0.1 must not be negative"),
    (dict(wrong_tags=0.1, names=("circle",)),
     "refiner.names=('circle',): name at least two tags, from which wrong ones are drawn"),
    (dict(seed=-1), "refiner.seed=-1 must be at least 0"),
])
def test_mistakes(changes, message):
  with pytest.raises(UserError) as error:
    imperfect(**changes)
  assert str(error.value) == message
