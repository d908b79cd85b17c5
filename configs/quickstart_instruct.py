"""Stage 2 on the quickstart's photos, from stage 1; the small language model is trained whole."""

from configs import quickstart
from lyrics_jax.config import Config, InstructConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
      stage="instruct", output="runs/quickstart/instruct", init_from="runs/quickstart/align", steps=1000, batch_size=8,
      log_every=20, checkpoint_every=250, model=quickstart.model(), data=quickstart.data(),
      instruct=InstructConfig(system_message="A chat about an image.", spatial_to_llm=True),
      optimizer=OptimizerConfig(peak_lr=1e-3, warmup_fraction=0.05))
