"""LLaVA-1.5, second stage (Liu et al. 2023): connector and language model are trained on conversations.

The published mixture has 665,000 conversations, which are 5,198 steps of 128. The mesh splits parameters over
16 chips: float32 parameters, gradients and moments of 7B are 108 GB. `llava15_finetune_lora.py` trains
adapters instead.
"""

from configs import llava15_pretrain
from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.data.templates import VicunaV1
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.sharding import MeshSettings
from lyrics_jax.stage import Stage
from lyrics_jax.training.optimizer import OptimizerSettings


def get_config() -> Config:
  return Config(
      output="runs/llava15_finetune", init_from="runs/llava15_pretrain", steps=5_198, batch_size=128,
      stage=Stage(model=llava15_pretrain.model(), objectives=(NextToken(),), train=("connector/*", "llm/*")),
      data=DataSettings(records="data/llava15_finetune/records", rows=Conversations(template=VicunaV1()),
                        llm_tokenizer="tokenizers/vicuna", use_refiner=False, llm_length=2048,
                        fit="pad", crop_scale=(1.0, 1.0), flip=False),
      optimizer=OptimizerSettings(peak_lr=2e-5, warmup_fraction=0.03, weight_decay=0.0, beta2=0.999),
      compute=Compute(remat="full"), mesh=MeshSettings(data=-1, fsdp=16))
