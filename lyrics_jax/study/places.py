"""Where the study keeps what it makes.

    OUTPUT/records/REFINER/SPLIT/   records of the scenes
    OUTPUT/tokenizers/              trained on their texts
    OUTPUT/runs/ROW/SEED/STAGE/     runs with their `figures.json`; rows that share a stage 1 share its directory
    OUTPUT/study.json, tables.md, *.png
"""

import dataclasses

UNSEEN = ("test", "held_out")  # kinds of unseen scenes; those of "held_out" have unseen combinations


@dataclasses.dataclass(frozen=True)
class Places:
  """Paths below the output directory `root`."""
  root: str

  def records(self, refiner: str, split: str) -> str:
    return f"{self.root}/records/{refiner}/{split}"

  @property
  def tokenizers(self) -> str:
    return f"{self.root}/tokenizers"

  def run(self, row: str, seed: int, stage: str) -> str:
    return f"{self.root}/runs/{row}/{seed}/{stage}"
