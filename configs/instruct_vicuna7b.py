"""Stage 2 with Vicuna-7B, otherwise as in `instruct_vicuna13b.py`.

The mesh splits parameters over 8 chips, the whole of a v5e:2x4; a larger slice has several such groups beside each other. On one
chip: `--config.mesh.fsdp=1 --config.model.remat=dots --config.model.frozen_dtype=int8 --config.optimizer.accumulate_steps=64`.
"""

from configs import instruct_vicuna13b
from lyrics_jax.config import Config, LLMConfig, MeshConfig


def get_config() -> Config:
  config = instruct_vicuna13b.get_config()
  config.output = "runs/instruct_vicuna7b"
  config.model.llm = LLMConfig(width=4096, layers=32, heads=32, kv_heads=32, mlp_dim=11008)
  config.model.remat = "full"  # with "dots" 8 rows a chip leave a v5e no room to gather parameters ahead
  config.mesh = MeshConfig(data=-1, fsdp=8)
  return config
