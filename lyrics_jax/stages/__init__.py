"""What a stage trains, the batch it reads and its loss. The training loop knows stages only through `base.Stage`."""

from lyrics_jax.config import Config
from lyrics_jax.stages.align import Align
from lyrics_jax.stages.base import Stage
from lyrics_jax.stages.instruct import Instruct


def make_stage(config: Config) -> Stage:
  return Align(config) if config.stage == "align" else Instruct(config)
