"""Trains Lyrics from scratch on a made-up world, and measures what it learns about scenes that it has not seen.

The study has rows, such as one without the visual refiner, and runs each with several seeds. It makes the scenes, two
tokenizers, an image encoder and a language model, then both stages of every row. Started again with the same --output,
it goes on where it stopped. It writes `study.json`, `tables.md` and plots into the output directory.
"""

import os
from collections.abc import Sequence

from lyrics_jax.study import report
from lyrics_jax.study.presets import PRESETS
from lyrics_jax.study.rows import ROWS, Row, find_row
from lyrics_jax.study.study import Study
from refiner_export.common.command import Command, Flag
from refiner_export.common.settings import require


def main(preset: str, output: str, seeds: int = 0, row: Sequence[str] = ()) -> None:
  """Runs all rows with the first seed, then with the second, and so on; writes the tables after each row."""
  sizes = PRESETS[preset]
  rows = _rows(row or sizes.rows)
  root = os.path.abspath(output)
  study = Study(sizes, root)
  study.prepare(rows)
  results, lines = [], []
  for seed in range(seeds or sizes.seeds):
    for one in rows:
      results.append(study.row(one, seed))
      lines = report.write(preset, study.places, results)
  print("\n".join(lines))
  print(f"tables, figures and plots: {root}", flush=True)


def _rows(names: Sequence[str]) -> list[Row]:
  rows = []
  for name in names:
    found = find_row(name)
    known = ", ".join(one.name for one in ROWS)
    require(found is not None, f"--row={name}: there is no such row; the rows are {known}")
    rows.append(found)
  return rows


COMMAND = Command(
    name="lyrics_jax.study",
    about=__doc__,
    main=main,
    flags=(
        Flag("preset", "how large: slice only shows that all works, small is sized for an hour on two CPU cores, "
             "full for an accelerator", choices=tuple(PRESETS), required=True),
        Flag("output", "directory to write to", metavar="DIR", required=True),
        Flag("seeds", "how many times each row is run; without it, as often as the preset says", default=0, at_least=0),
        Flag("row", "a row to run; without it, those of the preset", default=(), metavar="NAME"),
    ),
    examples=("python -m lyrics_jax.study --preset small --output runs/study",
              "python -m lyrics_jax.study --preset small --output runs/study --row full --row no_refiner --seeds 5"),
)

if __name__ == "__main__":
  COMMAND.run()
