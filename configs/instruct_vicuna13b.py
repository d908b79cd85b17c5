"""Stage 2 at the paper's size and schedule: Vicuna-13B with LoRA, batch 64, 300,000 steps.

The mesh splits parameters over 16 chips, the whole of a v5e:4x4; a larger slice, say v5p:4x4x4, has four such groups beside each
other. There `--config.mesh.fsdp=1` is faster, as a v5p holds the whole model (docs/plan.md). Say where your records, tokenizers and
stage 1 are: `--config.data.records=...`.
"""

from lyrics_jax.config import Config, DataConfig, MeshConfig, ModelConfig


def get_config() -> Config:
  return Config(
      stage="instruct", output="runs/instruct_vicuna13b", init_from="runs/align_vit_l", steps=300_000, batch_size=64,
      model=ModelConfig(remat="dots"), mesh=MeshConfig(data=-1, fsdp=16),
      data=DataConfig(records="data/instruct/records", mq_former_tokenizer="tokenizers/mq_former", llm_tokenizer="tokenizers/vicuna"))
