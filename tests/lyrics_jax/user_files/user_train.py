"""Trains the user's connector with the user's objective beside the published one."""

from user_parts import Colour, PooledSettings, WeightNorm, ZLoss

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.stage import Stage
from lyrics_jax.tasks import TASKS


def get_config() -> Config:
  return Config(
      stage=Stage(
          model=VLMSettings(
              vision=ViTSettings(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_dim=32),
              connector=PooledSettings(),
              llm=LlamaSettings(vocab_size=1024, width=16, layers=1, heads=2, kv_heads=2, mlp_dim=32, lora=None)),
          objectives=(NextToken(), ZLoss(weight=1e-3)),
          train=("connector/*",)),
      data=DataSettings(rows=Conversations(tasks=(*TASKS, Colour())), llm_length=96, buckets=(1.0,)),
      compute=Compute(dtype="float32", frozen_dtype="float32"),
      evaluations=(WeightNorm(),), steps=2, batch_size=4, log_every=1, checkpoint_every=1)
