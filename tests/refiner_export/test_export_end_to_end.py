"""Checkpoints on disk, pictures in, records out, and a step of the unchanged trainer on them."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_refiner import one_thread, tiny_ram_plus_size, tiny_refiner  # noqa: F401

from lyrics_jax.config import Config, DataConfig, MQFormerConfig, ModelConfig, RefinerConfig, VisionConfig
from lyrics_jax.data.train_tokenizers import record_texts, write_tokenizers
from lyrics_jax.training.loop import train
from refiner_export.export.config import ExportConfig, refiner_from_manifest
from refiner_export.export.pipeline import refine_photo
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import fingerprint
from refiner_export.export.run import export
from refiner_export.common.settings import UserError

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
  for record in records:
    assert record.detection_features.shape == (ROWS, 256) and record.detection_boxes.shape == (ROWS, 4)
    assert len(record.captions) == 2 and record.mask_features.shape == (len(record.tags), 256)
    assert all(name.islower() for name in record.tags) and (np.diff(record.scores) <= 0).all()
    assert ((record.boxes >= 0) & (record.boxes <= 1)).all() and (record.boxes[:, 2:] > record.boxes[:, :2]).all()
  assert {len(record.tags) > 0 for record in records} == {False, True}
  assert max(len(record.tags) for record in records) < 50


def test_the_features_are_those_of_the_stored_picture(directory, records, refiner):
  """The JPEG has changed the picture a little, and bfloat16 the features."""
  files = {f"{part}.{name}": getattr(getattr(refiner, part), name) for part, name in (
      ("tagger", "checkpoint"), ("tagger", "tag_list"), ("tagger", "thresholds"), ("detector", "checkpoint"),
      ("segmenter", "checkpoint"))}
  models = refiner_from_manifest(directory.manifest, files).build()
  again = refine_photo(records[0].image, models)
  rows = lambda record: record.detection_features.mean(axis=0)
  own, others = np.abs(rows(again) - rows(records[0])).mean(), np.abs(rows(records[1]) - rows(records[0])).mean()
  assert own < 0.5 * others


def test_a_step_of_stage_1(directory, records, tmp_path):
  write_tokenizers(record_texts(records), str(tmp_path / "tokenizers"))
  config = Config(
      stage="align", output=str(tmp_path / "run"), steps=1, batch_size=8, log_every=1, checkpoint_every=1,
      model=ModelConfig(
          vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_dim=32),
          refiner=RefinerConfig(detection_rows=ROWS, mask_rows=8),
          mq_former=MQFormerConfig(width=16, layers=2, heads=2, mlp_dim=32, visual_queries=2, grounding_queries=2,
                                   cross_attention_frequency=1, vocab_size=1024, max_positions=160, dropout=0.0,
                                   itc_width=8),
          dtype="float32", frozen_dtype="float32"),
      data=DataConfig(records=str(directory.path), fingerprint=directory.manifest.fingerprint,
                      mq_former_tokenizer=str(tmp_path / "tokenizers/mq_former"), spatial_length=96, caption_length=24,
                      buckets=(1.0,)))
  config.finalize()
  train(config)
  (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  losses = json.loads(line)
  assert losses["step"] == 1 and all(0 < losses[name] < 20 for name in ("itc", "itm", "icg", "msp"))
  config = dataclasses.replace(config, output=str(tmp_path / "other"),
                               data=dataclasses.replace(config.data, fingerprint="0123456789ab"))
  with pytest.raises(UserError, match=r"made by refiner .* \(neural\), the configuration expects 0123456789ab"):
    train(config)
