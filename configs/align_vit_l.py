"""Stage 1 at the paper's size and schedule: CLIP ViT-L/14, batch 512, 800,000 steps.

The mesh is that of a v5e:4x4: every chip holds the whole model and 32 pairs. On another slice data takes what there is. Say where
your records and tokenizers are: `--config.data.records=...`; BLIP-2's weights, of ViT-L: `--config.init_from=...`.
"""

from lyrics_jax.config import Config, DataConfig, MeshConfig, ModelConfig


def get_config() -> Config:
  return Config(
      stage="align", output="runs/align_vit_l", steps=800_000, batch_size=512, model=ModelConfig(remat="attention"),
      data=DataConfig(records="data/align/records", mq_former_tokenizer="tokenizers/mq_former"), mesh=MeshConfig(data=-1))
