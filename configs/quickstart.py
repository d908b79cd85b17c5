"""What both quickstart stages share: networks small enough for two CPU cores, and the twelve exported photos."""

from lyrics_jax.data.rows import Rows
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.connectors.q_former import LocalTokensSettings, QFormerSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.vision.vit import ViTSettings


def vision() -> ViTSettings:
  return ViTSettings(image_size=64, patch_size=8, width=64, layers=2, heads=4, mlp_dim=128)


def connector() -> QFormerSettings:
  return QFormerSettings(
      former=MQFormerSettings(width=96, layers=4, heads=2, mlp_dim=256, visual_queries=8, grounding_queries=16,
                              cross_attention_frequency=1, vocab_size=1024, max_positions=160, dropout=0.0),
      local=LocalTokensSettings(detection_rows=900, mask_rows=8))


def data(rows: Rows) -> DataSettings:
  return DataSettings(
      records="runs/quickstart/records", rows=rows,
      mq_former_tokenizer="runs/quickstart/tokenizers/mq_former",
      llm_tokenizer="runs/quickstart/tokenizers/llm",
      spatial_length=128, caption_length=40, llm_length=128, buckets=(1.0,),
      crop_scale=(0.4, 1.0), flip=False)  # so small a frozen image encoder cannot tell a mirrored photograph


def compute() -> Compute:
  return Compute(dtype="float32", frozen_dtype="float32", remat="dots")  # on a CPU, recomputing is faster than storing
