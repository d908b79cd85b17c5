"""The records of the study: scenes to train on, unseen scenes, and unseen scenes with unseen combinations."""

import os

from lyrics_jax.data.train_tokenizers import train_tokenizers
from lyrics_jax.study.places import UNSEEN, Places
from lyrics_jax.study.presets import Preset
from lyrics_jax.study.rows import NOISY
from refiner_export.export.config import ExportConfig
from refiner_export.export.run import export
from refiner_export.refiners.classical.imperfect import ImperfectRefiner
from refiner_export.sources.scene_shapes import SHAPES
from refiner_export.sources.scenes import Scenes

_FAULTS = dict(missed=0.1, jitter=0.05, wrong_tags=0.1, names=SHAPES)  # of the imperfect refiner


def make_world(preset: Preset, places: Places, refiner: str) -> None:
  """Exports the scenes as one of the two refiners sees them, and trains the tokenizers. What is begun is continued.

  Args:
    refiner: `rows.CLEAN` or `rows.NOISY`.
  """
  faults = _FAULTS if refiner == NOISY else {}
  for split in "train", *UNSEEN:
    count = preset.train if split == "train" else preset.test
    config = ExportConfig(
        output=places.records(refiner, split), refiner=ImperfectRefiner(grid=preset.grid, **faults),
        source=Scenes(count=count, split=split, size=2 * preset.vision.image_size, objects=preset.objects))
    config.finalize()
    export(config)
  if not os.path.exists(places.tokenizers):  # one refiner's texts have all words
    train_tokenizers(places.records(refiner, "train"), places.tokenizers)
