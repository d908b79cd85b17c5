"""Three exported photos and a stage-2 run of four steps on them: enough to ask, not enough to know."""

import pathlib

import pytest

from lyrics_jax.config import Config, DataConfig, InstructConfig, LLMConfig, MQFormerConfig, ModelConfig, RefinerConfig, VisionConfig
from lyrics_jax.data.train_tokenizers import record_texts, write_tokenizers
from lyrics_jax.training.loop import train
from refiner_export.export.config import ExportConfig
from refiner_export.records.reader import RecordDirectory
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.export.run import export
from refiner_export.sources.photos import Photos


@pytest.fixture(scope="session")
def export_photos(tmp_path_factory):
  """Exports the first `limit` photos and returns their directory."""

  def make(limit: int, grid: int = 4) -> pathlib.Path:
    output = tmp_path_factory.mktemp("photos") / "records"
    config = ExportConfig(output=str(output), source=Photos(), refiner=ClassicalRefiner(grid=grid), limit=limit)
    config.finalize()
    export(config)
    return output

  return make


@pytest.fixture(scope="session")
def exported(export_photos) -> pathlib.Path:
  return export_photos(3)


@pytest.fixture(scope="session")
def run(exported, tmp_path_factory) -> pathlib.Path:
  """The output directory of a finished run. Not to be changed: copy it."""
  folder = tmp_path_factory.mktemp("run")
  directory = RecordDirectory(exported)
  write_tokenizers(record_texts(directory[k] for k in range(len(directory))), str(folder / "tokenizers"))
  config = Config(
      stage="instruct", output=str(folder / "instruct"), steps=4, batch_size=8, log_every=1, checkpoint_every=4,
      model=ModelConfig(
          vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_dim=32),
          refiner=RefinerConfig(detection_rows=16, mask_rows=4),
          mq_former=MQFormerConfig(width=16, layers=2, heads=2, mlp_dim=32, visual_queries=2, grounding_queries=2,
                                   vocab_size=1024, max_positions=160, dropout=0.0),
          llm=LLMConfig(vocab_size=1024, width=16, layers=1, heads=2, kv_heads=2, mlp_dim=32, train="full"),
          dtype="float32", frozen_dtype="float32"),
      data=DataConfig(
          records=str(exported), mq_former_tokenizer=str(folder / "tokenizers/mq_former"),
          llm_tokenizer=str(folder / "tokenizers/llm"), spatial_length=64, caption_length=40, llm_length=96,
          buckets=(1.0,)),
      instruct=InstructConfig(system_message="A chat."))
  config.finalize()
  train(config)
  return folder / "instruct"
