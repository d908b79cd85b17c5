"""What both quickstart stages share: networks small enough for two CPU cores, and the twelve exported photos."""

from lyrics_jax.config import DataConfig, LLMConfig, MQFormerConfig, ModelConfig, RefinerConfig, VisionConfig


def model() -> ModelConfig:
  return ModelConfig(
      vision=VisionConfig(image_size=64, patch_size=8, width=64, layers=2, heads=4, mlp_dim=128),
      refiner=RefinerConfig(detection_rows=900, mask_rows=8),
      mq_former=MQFormerConfig(width=96, layers=4, heads=2, mlp_dim=256, visual_queries=8, grounding_queries=16,
                               cross_attention_frequency=1, vocab_size=1024, max_positions=160, dropout=0.0, itc_width=64),
      llm=LLMConfig(vocab_size=1024, width=128, layers=3, heads=4, kv_heads=4, mlp_dim=384, train="full"),
      dtype="float32", frozen_dtype="float32", remat="dots")  # on a CPU, recomputing is faster than storing


def data() -> DataConfig:
  return DataConfig(
      records="runs/quickstart/records",
      mq_former_tokenizer="runs/quickstart/tokenizers/mq_former",
      llm_tokenizer="runs/quickstart/tokenizers/llm",
      spatial_length=128, caption_length=40, llm_length=128, buckets=(1.0,),
      crop_scale=(0.4, 1.0), flip=False)  # so small a frozen image encoder cannot tell a mirrored photograph
