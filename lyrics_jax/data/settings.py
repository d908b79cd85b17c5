"""Settings of the data: where the records are and how they become batches."""

import dataclasses
from dataclasses import field
from typing import Literal

from lyrics_jax.data.batch import Fields, uses_vocabulary
from lyrics_jax.data.pairs import Pairs
from lyrics_jax.data.rows import Rows
from lyrics_jax.data.views import Fit
from refiner_export.common.checks import at_least
from refiner_export.common.settings import Settings, require


@dataclasses.dataclass(unsafe_hash=True)
class DataSettings(Settings):
  """Where the records are and how they become batches. Lengths are in tokens."""
  records: str = ""
  fingerprint: str = ""  # refuse records of another refiner; empty accepts what the manifest says
  rows: Rows = field(default_factory=Pairs)  # what one row of a batch is
  mq_former_tokenizer: str = ""  # directory of a BERT-style WordPiece tokenizer
  llm_tokenizer: str = ""  # directory of a LLaMA-style tokenizer
  spatial_length: int = 384
  caption_length: int = 96  # caption of a pair, instruction of a conversation
  llm_length: int = 512  # a row of conversations, the soft tokens of its pictures included
  pictures: int = 1  # most pictures of a row
  buckets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # shares that texts are cut to, see `data/buckets.py`
  coordinates: Literal["decimal", "integer"] = "decimal"  # 0.125 or 125 of 1000
  fit: Fit = "squash"  # how a picture becomes a square, see `data/views.py`
  crop_scale: tuple[float, float] = (0.5, 1.0)  # share of the area kept by the random resized crop; (1, 1) = no crop
  flip: bool = True
  use_refiner: bool = True  # false: no local tokens and no spatial representation (paper table 5)
  # What the model does not see (paper table 5): pixels, detector rows, mask rows, the spatial representation.
  blank: tuple[Literal["image", "detection", "masks", "spatial"], ...] = ()
  workers: int = 2  # reading threads per host

  def check(self, path):
    at_least(self, path, 2, "spatial_length", "caption_length", "llm_length")
    at_least(self, path, 1, "pictures")
    at_least(self, path, 0, "workers")
    low, high = self.crop_scale
    require(0 < low <= high <= 1, f"{path}.crop_scale={self.crop_scale} must satisfy 0 < low <= high <= 1")
    ascending = list(self.buckets) == sorted(set(self.buckets))
    require(ascending and bool(self.buckets) and self.buckets[0] > 0 and self.buckets[-1] == 1,
            f"{path}.buckets={self.buckets} must be ascending shares in (0, 1] that end with 1.0")
    self.rows.check_data(self, path)

  def shows(self, part: str) -> bool:
    """Whether the model sees this part of a picture, one of those that `blank` may name."""
    return part not in self.blank and (self.use_refiner or part == "image")

  def require_tokenizers(self, fields: Fields, path: str = "config.data") -> None:
    """Raises `UserError` when a field needs a tokenizer that these settings do not name."""
    for name, vocabulary in (("mq_former_tokenizer", "former_vocabulary"), ("llm_tokenizer", "llm_vocabulary")):
      require(bool(getattr(self, name)) or not uses_vocabulary(fields, vocabulary),
              f"{path}.{name} is empty: name a tokenizer directory")
