"""Stage 1 at the paper's size and schedule: CLIP ViT-L/14, batch 512, 800,000 steps.

The mesh is that of a v5e:4x4: every chip holds the whole model and 32 pairs. On another slice, `data` takes
as many chips as there are. Say where your records and tokenizers are: `--config.data.records=...`. BLIP-2's
weights, those with ViT-L, are another start: `--config.init_from=...`.
"""

from lyrics_jax.config import Config
from lyrics_jax.data.pairs import Pairs
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.objectives.icg import ICG
from lyrics_jax.objectives.itc import ITC
from lyrics_jax.objectives.itm import ITM
from lyrics_jax.objectives.msp import MSP
from lyrics_jax.sharding import MeshSettings
from lyrics_jax.stage import Stage


def get_config() -> Config:
  return Config(
      output="runs/align_vit_l", steps=800_000, batch_size=512,
      stage=Stage(
          model=AlignerSettings(vision=ViTSettings.clip_vit_l_14(), connector=QFormerSettings()),
          objectives=(ITC(), ITM(), ICG(), MSP()),
          train=("connector/*", "itc_*", "temperature", "itm/*", "lm_head/*")),  # all but the image encoder
      data=DataSettings(records="data/align/records", rows=Pairs(), mq_former_tokenizer="tokenizers/mq_former"),
      compute=Compute(remat="attention"), mesh=MeshSettings(data=-1))
