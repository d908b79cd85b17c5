"""Stage 2 on the quickstart's photos, from stage 1; the small language model is trained whole."""

from configs import quickstart
from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.templates import VicunaV1
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.stage import Stage
from lyrics_jax.training.optimizer import OptimizerSettings


def get_config() -> Config:
  return Config(
      output="runs/quickstart/instruct", init_from="runs/quickstart/align", steps=1000, batch_size=8,
      log_every=20, checkpoint_every=250,
      stage=Stage(
          model=VLMSettings(
              vision=quickstart.vision(), connector=quickstart.connector(),
              llm=LlamaSettings(vocab_size=1024, width=128, layers=3, heads=4, kv_heads=4, mlp_dim=384, lora=None)),
          objectives=(NextToken(),),
          train=("connector/*", "llm/*")),
      data=quickstart.data(
          Conversations(template=VicunaV1(system_message="A chat about an image."), spatial_to_llm=True)),
      compute=quickstart.compute(),
      optimizer=OptimizerSettings(peak_lr=1e-3, warmup_fraction=0.05))
