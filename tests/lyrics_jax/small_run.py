"""Exported photos and runs of a few steps on them: enough to ask, not enough to know.

They are made once for all test folders.
"""

import functools
import pathlib

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.data.templates import VicunaV1
from lyrics_jax.data.train_tokenizers import record_texts, write_tokenizers
from lyrics_jax.models.connectors.local_tokens import LocalTokensSettings
from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.stage import Stage
from lyrics_jax.train import train
from refiner_export.export.config import ExportConfig
from refiner_export.export.run import export
from refiner_export.records.reader import RecordDirectory
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.photos import Photos


GRID = 4  # of the classical refiner


def made_once(make):
  """Keeps what `make(tmp_path_factory, ...)` returns; the factory, which is one for the whole session, is not a key."""
  made = {}

  @functools.wraps(make)
  def once(tmp_path_factory, *arguments):
    if arguments not in made:
      made[arguments] = make(tmp_path_factory, *arguments)
    return made[arguments]

  return once


@made_once
def exported_photos(tmp_path_factory, limit: int, grid: int) -> pathlib.Path:
  """The directory of the first `limit` photos."""
  output = tmp_path_factory.mktemp("photos") / "records"
  config = ExportConfig(output=str(output), source=Photos(), refiner=ClassicalRefiner(grid=grid), limit=limit)
  config.finalize()
  export(config)
  return output


@made_once
def tokenizers(tmp_path_factory) -> pathlib.Path:
  """The directory of two tokenizers, trained on the texts of three photos."""
  directory = RecordDirectory(exported_photos(tmp_path_factory, 3, GRID))
  output = tmp_path_factory.mktemp("run") / "tokenizers"
  write_tokenizers(record_texts(directory[k] for k in range(len(directory))), str(output))
  return output


def vision_settings() -> ViTSettings:
  return ViTSettings(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_dim=32)


def connector_settings() -> QFormerSettings:
  former = MQFormerSettings(width=16, layers=2, heads=2, mlp_dim=32, visual_queries=2, grounding_queries=2,
                            vocab_size=1024, max_positions=160, dropout=0.0)
  return QFormerSettings(former=former, local=LocalTokensSettings(detection_rows=16, mask_rows=4))


def data_settings(tmp_path_factory, **changes) -> DataSettings:
  folder = tokenizers(tmp_path_factory)
  return DataSettings(
      records=str(exported_photos(tmp_path_factory, 3, GRID)), mq_former_tokenizer=str(folder / "mq_former"),
      llm_tokenizer=str(folder / "llm"), spatial_length=64, caption_length=40, llm_length=96, buckets=(1.0,), **changes)


def vlm_config(tmp_path_factory, output: pathlib.Path, lora: LoRASettings | None = None, **changes) -> Config:
  """Four steps of stage 2. Without adapters the language model is trained whole."""
  llm = LlamaSettings(vocab_size=1024, width=16, layers=1, heads=2, kv_heads=2, mlp_dim=32, lora=lora)
  model = VLMSettings(vision=vision_settings(), connector=connector_settings(), llm=llm)
  trained = "llm/*/lora_*" if lora else "llm/*"
  values = dict(
      stage=Stage(model=model, objectives=(NextToken(),), train=("connector/*", trained)),
      output=str(output), steps=4, batch_size=8, log_every=1, checkpoint_every=4,
      data=data_settings(tmp_path_factory, rows=Conversations(template=VicunaV1(system_message="A chat."))),
      compute=Compute(dtype="float32", frozen_dtype="float32"))
  config = Config(**values | changes)
  config.finalize()
  return config


@made_once
def trained_vlm(tmp_path_factory) -> pathlib.Path:
  """The output directory of a finished run. Not to be changed: copy it."""
  config = vlm_config(tmp_path_factory, tmp_path_factory.mktemp("vlm") / "instruct")
  train(config)
  return pathlib.Path(config.output)


@made_once
def trained_int8_vlm(tmp_path_factory) -> pathlib.Path:
  """The output directory of a run with adapters over matrices in int8."""
  config = vlm_config(tmp_path_factory, tmp_path_factory.mktemp("int8") / "instruct", LoRASettings(rank=4),
                      compute=Compute(dtype="float32", frozen_dtype="int8"))
  train(config)
  return pathlib.Path(config.output)
