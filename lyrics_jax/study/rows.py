"""The rows of the study's tables. A row says how its runs differ from those of the row "full"."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lyrics_jax.models.layers.lora import LoRASettings

CLEAN, NOISY = "clean", "noisy"  # the refiner that made the records


@dataclasses.dataclass(frozen=True)
class Row:
  """One row.

  Attributes:
    name: of its directory and of `--rows`.
    about: what it stands for, in the tables.
    align, instruct: dotted fields of the `Config` of stage 1 and of stage 2 -> their values in this row.
    align_share: the share of the full row's steps that stage 1 has; 0 leaves stage 1 out.
    refiner: which refiner saw the pictures, in training and in testing.
  """
  name: str
  about: str
  align: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  instruct: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  align_share: float = 1.0
  refiner: str = CLEAN

  @property
  def stage_1(self) -> "Row":
    """The first row with the same stage 1, which is run once for all of them."""
    for row in ROWS:
      if (row.align, row.align_share, row.refiner) == (self.align, self.align_share, self.refiner):
        return row
    return self


def _blank(name: str, about: str, *parts: str) -> Row:
  """A row whose model does not see these parts, in neither stage (paper table 5)."""
  return Row(name, about, {"data.blank": parts}, {"data.blank": parts})


_PROMPT = {"data.rows.spatial_to_llm": True, "data.llm_length": 320}
_LORA = {"stage.train": ("connector/*", "llm/*/lora_*"),
         "stage.model.llm.lora": LoRASettings(rank=8, alpha=16, dropout=0.0)}

ROWS = (
    Row("full", "full"),
    _blank("no_vit", "blank image encoder", "image"),
    _blank("no_detector", "blank detector: no rows, no spatial text", "detection", "spatial"),
    _blank("no_segmenter", "blank segmenter", "masks"),
    _blank("no_refiner", "blank refiner", "detection", "masks", "spatial"),
    _blank("blind", "nothing is seen", "image", "detection", "masks", "spatial"),
    Row("lora", "language model: LoRA", instruct=_LORA),
    Row("frozen", "language model: frozen", instruct={"stage.train": ("connector/*",)}),
    Row("align_10", "10 % of stage 1", align_share=0.1),
    Row("align_0", "no stage 1", align_share=0.0),
    Row("prompt", "spatial text in the prompt too", instruct=_PROMPT),
    Row("noise", "imperfect refiner", refiner=NOISY),
)


def find_row(name: str) -> Row | None:
  for row in ROWS:
    if row.name == name:
      return row
  return None
