"""Trains one stage: python -m lyrics_jax.train --config configs/quickstart_align.py [--config.optimizer.peak_lr=3e-4]

Started again, it continues from the newest checkpoint in config.output. On a TPU slice the same command runs on every host.
"""

from absl import flags

from lyrics_jax import logs
from lyrics_jax.config import Config
from lyrics_jax.training import hosts
from lyrics_jax.training.loop import train
from refiner_export.common import settings

CONFIG = settings.define(Config)
HOSTS = flags.DEFINE_string("hosts", None, "How several processes find each other where they are no TPU slice: auto, or "
                                           "ADDRESS:PORT,COUNT,INDEX.")


def main() -> None:
  hosts.join(HOSTS.value)
  train(CONFIG.value)


if __name__ == "__main__":
  logs.setup()
  settings.run(main, CONFIG)
