"""Stage 2 at the paper's size and schedule: Vicuna-13B with LoRA, batch 64, 300,000 steps.

The mesh splits parameters over 16 chips, the whole of a v5e:4x4. A larger slice, such as v5p:4x4x4, has
several such groups beside each other. On a v5p `--config.mesh.fsdp=1` is faster, because each chip holds the
whole model (docs/plan.md). Say where your records, tokenizers and stage 1 are: `--config.data.records=...`.
"""

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.sharding import MeshSettings
from lyrics_jax.stage import Stage


def get_config() -> Config:
  return Config(
      output="runs/instruct_vicuna13b", init_from="runs/align_vit_l", steps=300_000, batch_size=64,
      stage=Stage(
          model=VLMSettings(
              vision=ViTSettings.clip_vit_l_14(), connector=QFormerSettings(), llm=LlamaSettings.vicuna_13b()),
          objectives=(NextToken(),),
          train=("connector/*", "llm/*/lora_*")),
      data=DataSettings(records="data/instruct/records", rows=Conversations(),
                        mq_former_tokenizer="tokenizers/mq_former", llm_tokenizer="tokenizers/vicuna"),
      compute=Compute(remat="dots"), mesh=MeshSettings(data=-1, fsdp=16))
