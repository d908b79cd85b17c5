"""Measures how well an aligner finds the captions of pictures, and the pictures of captions.

Each record is a picture and each caption a text. i2t finds texts for a picture, t2i pictures for a text: by ITC and,
among the best of those, by ITM. Texts carry the objects of their picture (see `evaluation/retriever.py`); the lines
`captions only` are without them.
"""

import json

from etils import epath

from lyrics_jax.evaluation.retrieval import KS
from lyrics_jax.evaluation.retriever import FIGURES, Retriever, retrieve
from lyrics_jax.inference.loaded import LoadedModel, parse_mesh
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common.command import Command, Flag
from refiner_export.common.files import write_atomically
from refiner_export.common.settings import existing_path
from refiner_export.records.reader import RecordDirectory

_BATCH = 32


def evaluate(checkpoint: str, records: str, rerank: int = 16, output: str | None = None,
             mesh: str | None = None) -> dict[str, float]:
  """Prints the recalls, writes them to `output`, and returns them. Raises `UserError`."""
  if output:
    existing_path(epath.Path(output).parent, "directory of --output", "Make it first.")
  trained_on = trained_manifest(checkpoint, saved_config(checkpoint))
  directory = RecordDirectory(records, trained_on.fingerprint)

  loaded = LoadedModel.open(checkpoint, parse_mesh(mesh), AlignerSettings)
  results = retrieve(Retriever(loaded, _BATCH), directory, rerank)

  same = trained_on == directory.manifest
  print(f"{len(directory)} pictures, {'the records it was trained on' if same else 'records it was not trained on'}; "
        "recall in percent")
  print("\n".join(table(results, rerank)), flush=True)
  if output:
    report = {"records": len(directory), "trained_on_these_records": same, "rerank": rerank} | results
    write_atomically(epath.Path(output), (json.dumps(report, indent=2) + "\n").encode())
  return results


def table(results: dict[str, float], rerank: int) -> list[str]:
  """Lines of text: one line per figure and way of ranking, one column per direction and K."""
  names = [f"R@{k}" for k in KS]
  lines = [_row("", ["", "", "i2t"], ["", "", "t2i"]), _row("", names, names)]
  for figure, texts in zip(FIGURES, ("texts with objects", "captions only")):
    for way, ranking in (("itc", "ITC"), ("itm", f"ITM of the {rerank} best")):
      if f"{figure}{way}_i2t_r1" in results:
        i2t = _percent(results, f"{figure}{way}_i2t")
        t2i = _percent(results, f"{figure}{way}_t2i")
        lines.append(_row(f"{texts}, {ranking}", i2t, t2i))
  return lines


def _percent(results: dict[str, float], name: str) -> list[str]:
  return [f"{100 * results[f'{name}_r{k}']:.1f}" for k in KS]


def _row(name: str, i2t: list[str], t2i: list[str]) -> str:
  cells = "{:>7}{:>7}{:>7}"
  return f"{name:40}" + cells.format(*i2t) + "   " + cells.format(*t2i)


COMMAND = Command(
    name="lyrics_jax.retrieve",
    about=__doc__,
    main=evaluate,
    flags=(
        Flag("checkpoint", "output directory of a run that trained an aligner", metavar="RUN", required=True),
        Flag("records", "directory of records that refiner_export wrote", metavar="DIR", required=True),
        Flag("rerank", "how many of the best by ITC are ranked again by ITM; 0: none", default=16, at_least=0),
        Flag("output", "JSON file to write the recalls to", metavar="FILE.json"),
        Flag("mesh", "devices per mesh axis; without it, one device computes", metavar="DATA,FSDP,TENSOR"),
    ),
    examples=("python -m lyrics_jax.retrieve --checkpoint RUN --records HELD_OUT",),
)

if __name__ == "__main__":
  COMMAND.run()
