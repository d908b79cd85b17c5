"""The settings of storage, through a whole export: what a reader gets, what the manifest says, what is refused."""

import dataclasses

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from refiner_export.common.settings import UserError
from refiner_export.export import pipeline, run
from refiner_export.export.config import FeatureSettings
from refiner_export.common.images import UnreadableImage
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import RecordError
from refiner_export.records.verify import verify
from refiner_export.refiners.classical.refiner import ClassicalRefiner, MaskDescriber


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def read(directory):
  records = RecordDirectory(directory)
  return [records[k].picture for k in range(len(records))]


def given(config):
  """The pictures as the refiner gives them, before anything is stored."""
  examples = [example for unit in config.source.shards() for example in config.source.read(unit)]
  results = pipeline.refine(examples, config.refiner.build(), config.image, "coco")
  return [result.picture for result in results if not isinstance(result, UnreadableImage)]


@pytest.fixture(scope="module", params=[
    ("float16", None, "tfrecord"), ("bfloat16", 5, "array_record"),
    ("int8", 3, "tfrecord"), ("int8", None, "array_record")])
def stored(request, coco, make, tmp_path_factory):
  dtype, top_k, format = request.param
  config = make(coco, tmp_path_factory.mktemp("stored") / "records", format=format,
                features=FeatureSettings(dtype=dtype, top_k=top_k))
  return config, run.export(config)


def test_records_are_those_of_the_refiner_within_the_tolerance(stored):
  config, manifest = stored
  tolerances = {"float16": (2**-11, 0), "bfloat16": (2**-8, 0), "int8": (0, 0.502 / 127)}
  relative, of_largest = tolerances[config.features.dtype]
  assert manifest.detection_rows == (config.features.top_k or 16)
  for before, after in zip(given(config), read(config.output), strict=True):
    for name, rows in ("detection_features", manifest.detection_rows), ("mask_features", None):
      old, new = getattr(before, name)[:rows], getattr(after, name)
      assert old.shape == new.shape
      allowed = np.abs(old) * relative + np.abs(old).max(axis=1, keepdims=True, initial=0) * of_largest
      assert (np.abs(new - old) <= allowed + 2**-25).all()
    np.testing.assert_allclose(after.detection_boxes, before.detection_boxes[:manifest.detection_rows], atol=8e-6)
    np.testing.assert_array_equal(after.mask_areas, before.mask_areas)
    np.testing.assert_array_equal(after.mask_ious, np.ones(len(before.tags)))
    assert after.tags == before.tags and after.mask_rles == ()


def test_the_manifest_says_what_storing_cost(stored):
  """Against one pass over all rows of all records."""
  config, manifest = stored
  pairs = [(old[:len(new)], new) for before, after in zip(given(config), read(config.output), strict=True)
           for old, new in ((before.detection_features, after.detection_features),
                            (before.mask_features, after.mask_features))]
  old, new = (np.concatenate(rows).astype(np.float64) for rows in zip(*pairs))
  storage = manifest.storage
  rmse = np.sqrt(((new - old)**2).mean() / (old**2).mean())
  np.testing.assert_allclose(storage.feature_relative_rmse, rmse, rtol=1e-9)
  lengths = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
  cosines = np.where(lengths > 0, (old * new).sum(axis=1) / np.where(lengths > 0, lengths, 1), 1)
  np.testing.assert_allclose(storage.feature_mean_cosine, cosines.mean(), rtol=1e-12)
  width = 256 + 2 if config.features.dtype == "int8" else 512
  assert storage.feature_bytes_per_record == (len(old) * width + 4 * manifest.detection_rows * 8) / 4
  assert storage.bytes_per_record == sum(shard.bytes for shard in manifest.shards) / 4


def test_verify_finds_nothing(stored):
  assert list(verify(stored[0].output)) == []


def test_a_stopped_export_ends_with_the_same_bytes(stored, tmp_path, monkeypatch):
  """So the sums of the features are those of one run, whoever made which shard."""
  config = dataclasses.replace(stored[0], output=str(tmp_path / "out"), batch=1)
  refine, seen = pipeline.refine_read, []

  def killed(examples, *arguments):
    if len(seen) == 3:
      raise KeyboardInterrupt
    seen.extend(examples)
    return refine(examples, *arguments)

  monkeypatch.setattr(pipeline, "refine_read", killed)
  with pytest.raises(KeyboardInterrupt):
    run.export(config)
  monkeypatch.setattr(pipeline, "refine_read", refine)
  run.export(config)
  assert contents(tmp_path / "out") == contents(RecordDirectory(stored[0].output).path)


@dataclasses.dataclass(unsafe_hash=True)
class MaskingRefiner(ClassicalRefiner):
  """Gives the upper half of the picture as every object's mask; `count` of them at most."""
  count: int = 99

  def describe(self):
    return ClassicalRefiner(self.grid).describe()

  @property
  def segmenter(self):
    return HalfMasker(self.count)


class HalfMasker(MaskDescriber):
  store_masks = True

  def __init__(self, count):
    self.count = count

  def segment(self, pictures, detections):
    segments = super().segment(pictures, detections)
    halves = [np.asfortranarray(np.arange(picture.image.height)[:, None].repeat(picture.image.width, 1)
                                < picture.image.height // 2, np.uint8) for picture in pictures]
    return [dataclasses.replace(
        found, rles=(coco_mask.encode(half)["counts"],) * min(len(found.features), self.count),
        areas=np.full(len(found.features), half.mean(), np.float32)) for found, half in zip(segments, halves)]


def test_masks_are_stored(coco, tmp_path, make):
  config = make(coco, tmp_path / "out", refiner=MaskingRefiner(grid=4), features=FeatureSettings(masks=True))
  assert run.export(config).optional_fields == ("mask_ious", "mask_areas", "mask_rles")
  records = read(tmp_path / "out")
  assert [len(record.mask_rles) for record in records] == [len(record.tags) for record in records] and records[0].tags
  mask = coco_mask.decode({"size": [records[0].height, records[0].width], "counts": records[0].mask_rles[0]})
  assert mask[:30].all() and not mask[30:].any()
  assert list(verify(tmp_path / "out")) == []


def test_masks_that_nobody_gives(coco, tmp_path, make):
  with pytest.raises(UserError, match="^config.features.masks: the refiner's segmenter gives no masks; SAM-HQ does "):
    make(coco, tmp_path / "out", features=FeatureSettings(masks=True))
  config = make(coco, tmp_path / "out", refiner=MaskingRefiner(grid=4, count=1), features=FeatureSettings(masks=True))
  with pytest.raises(RecordError, match="^record 1: picture 0: 3 objects, but 1 mask_rles: have the segmenter give "):
    run.export(config)


@pytest.mark.parametrize("changes, message", [
    ({"features": FeatureSettings(dtype="float32")}, "config.features.dtype: expected one of .*, got 'float32'"),
    ({"features": FeatureSettings(top_k=0)}, "config.features.top_k: expected at least 1, got 0"),
    ({"features": FeatureSettings(top_k=0.5)}, "config.features.top_k: expected int | None, got 0.5"),
    ({"format": "parquet"}, r"config.format: expected one of \('tfrecord', 'array_record'\), got 'parquet'")])
def test_settings_are_checked(coco, tmp_path, make, changes, message):
  with pytest.raises(UserError, match=f"^{message}"):
    make(coco, tmp_path / "out", **changes)


def test_another_storage_is_another_export(coco, finished, make):
  with pytest.raises(UserError, match="was begun with another config.features, config.format: remove the directory"):
    run.export(make(coco, finished, format="array_record", features=FeatureSettings(top_k=3)))
