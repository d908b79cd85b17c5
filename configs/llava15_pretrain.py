"""LLaVA-1.5, first stage (Liu et al. 2023): captions train only the MLP between image encoder and language model.

The start has the weights of CLIP ViT-L/14 at 336 pixels and of Vicuna-7B v1.5:

  python -m lyrics_jax.convert from-hf --config configs/llava15_pretrain.py --clip DIR --llama DIR \\
      --output runs/llava15_start

The published data set has 558,000 pictures with a caption, which are 2,181 steps of 256. For the 13B model
write `vicuna_13b()` in `model()`. The mesh splits parameters over 8 chips, the whole of a v5e:2x4.
"""

import dataclasses

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.data.templates import Plain
from lyrics_jax.models.connectors.mlp import MLPSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.sharding import MeshSettings
from lyrics_jax.stage import Stage
from lyrics_jax.training.optimizer import OptimizerSettings


def model() -> VLMSettings:
  """The connector reads the 576 patches of the last block but one; the published encoder has 24 blocks."""
  return VLMSettings(
      vision=ViTSettings(image_size=336, layers=23, class_token="drop"),
      connector=MLPSettings(),
      llm=dataclasses.replace(LlamaSettings.vicuna_7b(), norm_eps=1e-5, max_positions=4096, lora=None))


def get_config() -> Config:
  return Config(
      output="runs/llava15_pretrain", init_from="runs/llava15_start", steps=2_181, batch_size=256,
      stage=Stage(model=model(), objectives=(NextToken(),), train=("connector/*",)),
      data=DataSettings(records="data/llava15_pretrain/records", rows=Conversations(template=Plain()),
                        llm_tokenizer="tokenizers/vicuna", use_refiner=False,
                        llm_length=768, buckets=(1.0,),  # 576 soft tokens and a caption
                        fit="crop", crop_scale=(1.0, 1.0), flip=False),
      optimizer=OptimizerSettings(peak_lr=1e-3, warmup_fraction=0.03, weight_decay=0.0, beta2=0.999),
      compute=Compute(remat="full"), mesh=MeshSettings(data=-1, fsdp=8))
