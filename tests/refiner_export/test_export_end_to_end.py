"""Checkpoints on disk, pictures in, records out, and a step of the unchanged trainer on them."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_refiner import one_thread, tiny_ram_plus_size, tiny_refiner  # noqa: F401

from lyrics_jax.config import Config
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.data.train_tokenizers import record_texts, write_tokenizers
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.connectors.q_former import LocalTokensSettings, QFormerSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.objectives.icg import ICG
from lyrics_jax.objectives.itc import ITC
from lyrics_jax.objectives.itm import ITM
from lyrics_jax.objectives.msp import MSP
from lyrics_jax.stage import Stage
from lyrics_jax.train import train
from refiner_export.common.settings import UserError
from refiner_export.export.config import ExportConfig, refiner_from_manifest
from refiner_export.export.pipeline import refine_photo
from refiner_export.export.run import export
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.schema import fingerprint

ROWS = 900  # as published; the networks are tiny, the records are not
TOKENS = 256


@pytest.fixture(scope="module")
def refiner(tmp_path_factory, one_thread, tiny_ram_plus_size):  # noqa: F811
  """The thresholds leave a picture a few of the many boxes that random networks see, and another none."""
  return tiny_refiner(tmp_path_factory.mktemp("refiner"), ROWS, TOKENS, tag_threshold=0.1, text_threshold=0.78,
                      shortest=224, longest=448)


@pytest.fixture(scope="module")
def directory(refiner, coco, tmp_path_factory):
  output = tmp_path_factory.mktemp("neural") / "records"
  config = ExportConfig(str(output), coco, refiner, records_per_shard=2)
  config.finalize()
  export(config)
  return RecordDirectory(output)


@pytest.fixture(scope="module")
def records(directory):
  return [directory[k] for k in range(len(directory))]


def test_the_records(directory, records, refiner):
  manifest = directory.manifest
  assert (manifest.records, manifest.skipped, manifest.detection_rows) == (4, 1, ROWS)
  assert manifest.refiner == json.loads(json.dumps(refiner.describe()))
  assert manifest.fingerprint == fingerprint(refiner.describe())
  assert [record.id for record in records] == ["1", "2", "3", "5"]
  pictures = [record.picture for record in records]
  for picture in pictures:
    assert picture.detection_features.shape == (ROWS, 256) and picture.detection_boxes.shape == (ROWS, 4)
    assert picture.mask_features.shape == (len(picture.tags), 256)
    assert all(name.islower() for name in picture.tags) and (np.diff(picture.scores) <= 0).all()
    assert ((picture.boxes >= 0) & (picture.boxes <= 1)).all() and (picture.boxes[:, 2:] > picture.boxes[:, :2]).all()
  assert all(len(record.captions) == 2 for record in records)
  assert {len(picture.tags) > 0 for picture in pictures} == {False, True}
  assert max(len(picture.tags) for picture in pictures) < 50


def test_the_features_are_those_of_the_stored_picture(directory, records, refiner):
  """The JPEG has changed the picture a little, and bfloat16 the features."""
  files = {f"{part}.{name}": getattr(getattr(refiner, part), name) for part, name in (
      ("tagger", "checkpoint"), ("tagger", "tag_list"), ("tagger", "thresholds"), ("detector", "checkpoint"),
      ("segmenter", "checkpoint"))}
  models = refiner_from_manifest(directory.manifest, files).build()
  again = refine_photo(records[0].picture.image, models)
  rows = lambda record: record.picture.detection_features.mean(axis=0)
  own, others = np.abs(rows(again) - rows(records[0])).mean(), np.abs(rows(records[1]) - rows(records[0])).mean()
  assert own < 0.5 * others


def test_a_step_of_stage_1(directory, records, tmp_path):
  write_tokenizers(record_texts(records), str(tmp_path / "tokenizers"))
  model = AlignerSettings(
      vision=ViTSettings(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_dim=32),
      connector=QFormerSettings(
          former=MQFormerSettings(width=16, layers=2, heads=2, mlp_dim=32, visual_queries=2, grounding_queries=2,
                                  cross_attention_frequency=1, vocab_size=1024, max_positions=160, dropout=0.0),
          local=LocalTokensSettings(detection_rows=ROWS, mask_rows=8)),
      itc_width=8)
  config = Config(
      stage=Stage(model, objectives=(ITC(), ITM(), ICG(), MSP(mask_at_least_one=True)),
                  train=("connector/*", "itc_*", "temperature", "itm/*", "lm_head/*")),
      output=str(tmp_path / "run"), steps=1, batch_size=8, log_every=1, checkpoint_every=1,
      compute=Compute(dtype="float32", frozen_dtype="float32"),
      data=DataSettings(records=str(directory.path), fingerprint=directory.manifest.fingerprint,
                        mq_former_tokenizer=str(tmp_path / "tokenizers/mq_former"), spatial_length=96,
                        caption_length=24, buckets=(1.0,)))
  config.finalize()
  train(config)
  (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  losses = json.loads(line)
  assert losses["step"] == 1 and all(0 < losses[name] < 20 for name in ("itc", "itm", "icg", "msp"))
  config = dataclasses.replace(config, output=str(tmp_path / "other"),
                               data=dataclasses.replace(config.data, fingerprint="0123456789ab"))
  with pytest.raises(UserError, match=r"made by refiner .* \(neural\), the configuration expects 0123456789ab"):
    train(config)
