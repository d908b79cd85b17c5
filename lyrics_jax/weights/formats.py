"""Which form the exported directory of a model has: the one place that decides it."""

from lyrics_jax.config import Config
from lyrics_jax.weights.hf_format import HFFormat
from lyrics_jax.weights.llava_format import Llava
from lyrics_jax.weights.lyrics_format import LyricsAlignment, LyricsGeneration
from refiner_export.common.settings import UserError

FORMATS = (LyricsAlignment, LyricsGeneration, Llava)


def format_of(config: Config, apart: bool = False) -> HFFormat:
  """The form of a run's model; see `HFFormat`. Raises `UserError` for a model that no class of transformers is."""
  model = config.stage.model
  for kind in FORMATS:
    if kind.writes(model):
      return kind(config, apart)
  raise UserError(f"{type(model).__name__} with {type(model.connector).__name__} cannot be written in Hugging Face's "
                  "form: write a format for it beside weights/llava_format.py")
