"""LLaVA-1.5, second stage with LoRA: adapters on every linear map of the language model, and the connector.

The adapters have a learning rate of 2e-4; the connector keeps that of the full fine-tuning, 2e-5.
"""

from configs import llava15_finetune
from lyrics_jax.config import Config
from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.sharding import MeshSettings
from lyrics_jax.training.optimizer import Rate


def get_config() -> Config:
  config = llava15_finetune.get_config()
  config.output = "runs/llava15_finetune_lora"
  config.stage.model.llm.lora = LoRASettings(
      rank=128, alpha=256.0, dropout=0.05, targets=("q", "k", "v", "o", "gate", "up", "down"))
  config.stage.train = ("connector/*", "llm/*/lora_*")
  config.optimizer.peak_lr = 2e-4
  config.optimizer.rates = (Rate("connector/*", 2e-5),)
  config.mesh = MeshSettings(data=-1, fsdp=8)
  return config
