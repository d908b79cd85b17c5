"""Data settings of small runs, with the fields and dimensions that a small model would give."""

import dataclasses
from typing import Any

import pytest

from lyrics_jax.data.batch import Dimensions, Fields, select
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.loader import train_batches
from lyrics_jax.data.pairs import Pairs
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.objectives.icg import ICG
from lyrics_jax.objectives.msp import MSP

LOCAL = ("image", "detection", "masks")
PAIR_FIELDS = (*LOCAL, "spatial_ids", "caption_ids")
CONVERSATION_FIELDS = (*LOCAL, "picture_mask", "spatial_ids", "instruction_ids", "ids", "segments", "targets", "slot")


@dataclasses.dataclass(frozen=True)
class Run:
  """What the data of a run is made of, and how training would use it."""
  data: DataSettings
  fields: Fields
  dimensions: Dimensions
  objectives: tuple[Any, ...] = ()
  batch_size: int = 4
  seed: int = 3

  @property
  def examples(self):
    return self.data.rows.examples(self.data, self.fields, self.dimensions, self.objectives)

  def batches(self, records, process_index=0, process_count=1):
    return train_batches(self.data, self.examples, records, self.batch_size, self.seed, process_index, process_count)


@pytest.fixture(scope="session")
def make_run(tokenizer_directory):
  """`make_run(rows, names, batch_size, seed, sizes, **changes)`: changes are those of `DataSettings`."""

  def make(rows=None, names=None, batch_size=4, seed=3, sizes=None, **changes) -> Run:
    rows = rows or Pairs()
    objectives = (ICG(), MSP()) if isinstance(rows, Pairs) else ()
    names = names or (PAIR_FIELDS if objectives else CONVERSATION_FIELDS)
    added = {}
    for objective in objectives:
      added |= objective.adds
    values = dict(
        records="memory", mq_former_tokenizer=f"{tokenizer_directory}/mq_former",
        llm_tokenizer=f"{tokenizer_directory}/llm", spatial_length=192, caption_length=24, llm_length=320,
        buckets=(1.0,))
    data = DataSettings(rows=rows, **values | changes)
    data.finalize("config.data")
    dimensions = Dimensions(
        rows=batch_size, pictures=data.pictures, image_size=28, detection_rows=8, mask_rows=5, local_width=260,
        spatial=data.spatial_length, caption=data.caption_length, conversation=data.llm_length, tokens=4,
        former_vocabulary=1024, llm_vocabulary=1024)
    dimensions = dataclasses.replace(dimensions, **sizes or {})
    return Run(data, select(names, added), dimensions, objectives, batch_size, seed)

  return make


@pytest.fixture(scope="session", params=["pairs", "conversations"])
def rows(request):
  """Both kinds of rows."""
  return Pairs() if request.param == "pairs" else Conversations()
