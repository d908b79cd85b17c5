"""The published weights, Ziya-Visual-Lyrics-14B: to ask, to export, or to train on at stage 2.

  python -m lyrics_jax.convert from-hf --config configs/ziya_lyrics_14b.py --ziya WEIGHTS --output runs/ziya_lyrics_14b_start

Sizes are the defaults of the authors' code, of the language model Vicuna-13B's; where the config.json of the weights says
something else, such as a larger vocabulary, the conversion names the field to set. Mask tokens are left out: the weights
have none, and without them the MQ-Former gives what theirs gives. The mesh is that of `instruct_vicuna13b.py`; the
conversion runs on any machine.
"""

import dataclasses

from configs import instruct_vicuna13b
from lyrics_jax.config import Config, MQFormerConfig, RefinerConfig, VisionConfig


def get_config() -> Config:
  config = instruct_vicuna13b.get_config()
  config.output, config.init_from = "runs/ziya_lyrics_14b", "runs/ziya_lyrics_14b_start"
  config.model.vision = dataclasses.replace(VisionConfig.vit_g(), norm_eps=1e-5)  # BLIP-2's own code has 1e-6
  config.model.mq_former = MQFormerConfig(visual_queries=32, grounding_queries=64, activation="gelu")
  config.model.refiner = RefinerConfig(mask_rows=0)
  return config
