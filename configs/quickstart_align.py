"""Stage 1 on the quickstart's photos: one batch is all twelve of them."""

from configs import quickstart
from lyrics_jax.config import Config
from lyrics_jax.data.pairs import Pairs
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.objectives.icg import ICG
from lyrics_jax.objectives.itc import ITC
from lyrics_jax.objectives.itm import ITM
from lyrics_jax.objectives.msp import MSP
from lyrics_jax.stage import Stage
from lyrics_jax.training.optimizer import OptimizerSettings


def get_config() -> Config:
  return Config(
      output="runs/quickstart/align", steps=120, batch_size=12, log_every=20, checkpoint_every=60,
      stage=Stage(
          model=AlignerSettings(vision=quickstart.vision(), connector=quickstart.connector(), itc_width=64),
          objectives=(ITC(label_smoothing=0.0), ITM(), ICG(label_smoothing=0.0), MSP(label_smoothing=0.0)),
          train=("connector/*", "itc_*", "temperature", "itm/*", "lm_head/*")),
      data=quickstart.data(Pairs()), compute=quickstart.compute(),
      optimizer=OptimizerSettings(peak_lr=1e-3, warmup_fraction=0.1))
