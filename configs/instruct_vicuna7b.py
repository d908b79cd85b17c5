"""Stage 2 with Vicuna-7B, otherwise as in `instruct_vicuna13b.py`.

The mesh splits parameters over 8 chips, the whole of a v5e:2x4. A larger slice has several such groups beside
each other. On one chip: `--config.mesh.fsdp=1 --config.compute.remat=dots --config.compute.frozen_dtype=int8
--config.optimizer.accumulate_steps=64`.
"""

from configs import instruct_vicuna13b
from lyrics_jax.config import Config
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.sharding import MeshSettings


def get_config() -> Config:
  config = instruct_vicuna13b.get_config()
  config.output = "runs/instruct_vicuna7b"
  config.stage.model.llm = LlamaSettings.vicuna_7b()
  config.compute.remat = "full"  # with "dots", 8 rows a chip leave a v5e no room to gather parameters ahead
  config.mesh = MeshSettings(data=-1, fsdp=8)
  return config
