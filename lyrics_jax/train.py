"""Trains one stage: python -m lyrics_jax.train --config configs/quickstart_align.py [--config.optimizer.peak_lr=3e-4]

Started again, it continues from the newest checkpoint in config.output.
"""

from lyrics_jax import logs
from lyrics_jax.config import Config
from lyrics_jax.training.loop import train
from refiner_export import settings

CONFIG = settings.define(Config)

if __name__ == "__main__":
  logs.setup()
  settings.run(lambda: train(CONFIG.value), CONFIG)
