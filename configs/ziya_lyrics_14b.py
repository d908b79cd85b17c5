"""The published weights, Ziya-Visual-Lyrics-14B: to ask, to export, or to train on at stage 2.

  python -m lyrics_jax.convert from-hf --config configs/ziya_lyrics_14b.py --ziya WEIGHTS --output
  runs/ziya_lyrics_14b_start

The sizes are the defaults of the authors' code, those of the language model are Vicuna-13B's. Where the
config.json of the weights says something else, such as a larger vocabulary, the conversion names the field to
set. There are no mask tokens: the weights have none, and without them the MQ-Former gives what the authors'
MQ-Former gives. The mesh is that of `instruct_vicuna13b.py`; the conversion runs on any machine.
"""

import dataclasses

from configs import instruct_vicuna13b
from lyrics_jax.config import Config
from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.connectors.q_former import LocalTokensSettings, QFormerSettings
from lyrics_jax.models.vision.vit import ViTSettings


def get_config() -> Config:
  config = instruct_vicuna13b.get_config()
  config.output, config.init_from = "runs/ziya_lyrics_14b", "runs/ziya_lyrics_14b_start"
  # BLIP-2's code has an epsilon of 1e-6; the authors of Lyrics have 1e-5.
  config.stage.model.vision = dataclasses.replace(ViTSettings.eva_vit_g_14(), norm_eps=1e-5)
  config.stage.model.connector = QFormerSettings(
      former=MQFormerSettings(visual_queries=32, grounding_queries=64, activation="gelu"),
      local=LocalTokensSettings(mask_rows=0))
  return config
