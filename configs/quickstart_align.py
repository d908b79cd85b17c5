"""Stage 1 on the quickstart's photos: one batch is all twelve of them."""

from configs import quickstart
from lyrics_jax.config import AlignConfig, Config, OptimizerConfig


def get_config() -> Config:
  return Config(
      stage="align", output="runs/quickstart/align", steps=120, batch_size=12, log_every=20, checkpoint_every=60,
      model=quickstart.model(), data=quickstart.data(), align=AlignConfig(label_smoothing=0.0),
      optimizer=OptimizerConfig(peak_lr=1e-3, warmup_fraction=0.1))
