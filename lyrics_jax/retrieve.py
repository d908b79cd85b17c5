"""How well a stage-1 run finds the captions of pictures, and the pictures of captions:

  python -m lyrics_jax.retrieve --checkpoint=RUN --records=DIR [--rerank=16] [--output=FILE.json]

Every record is a picture, every caption a text; i2t finds texts for a picture, t2i pictures for a text, both by ITC and,
among the best of those, by ITM. Texts carry the objects of their own picture (see `evaluation/retriever.py`); the lines
`captions only` are without them.
"""

import json

from absl import flags
from etils import epath

from lyrics_jax import logs
from lyrics_jax.evaluation.retrieval import KS
from lyrics_jax.evaluation.retriever import FIGURES, Retriever, retrieve
from lyrics_jax.evaluation.trained import TrainedModel
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common import settings
from refiner_export.records.reader import RecordDirectory
from refiner_export.common.settings import existing_path, require
from refiner_export.common.files import write_atomically

_BATCH = 32


def evaluate(checkpoint: str, records: str, rerank: int = 16, output: str | None = None) -> dict[str, float]:
  """Prints the recalls, writes them to `output`, and returns them. Raises `UserError`."""
  require(bool(checkpoint), "--checkpoint is required: name the output directory of a stage-1 run")
  require(bool(records), "--records is required: name a directory that refiner_export wrote")
  require(rerank >= 0, f"--rerank={rerank}: name how many of the best to rank again, or 0 for none")
  if output:
    existing_path(epath.Path(output).parent, "directory of --output", "Make it first.")
  trained_on = trained_manifest(checkpoint, saved_config(checkpoint))
  directory = RecordDirectory(records, trained_on.fingerprint)

  model = TrainedModel(checkpoint, "align")
  results = retrieve(Retriever(model.plan, model.mesh, _BATCH), model.parameters, directory, rerank)

  whose = "the records it was trained on" if trained_on == directory.manifest else "records it was not trained on"
  print(f"{len(directory)} pictures, {whose}; recall in percent")
  print("\n".join(table(results, rerank)), flush=True)
  if output:
    report = {"records": len(directory), "trained_on_these_records": trained_on == directory.manifest, "rerank": rerank} | results
    write_atomically(epath.Path(output), (json.dumps(report, indent=2) + "\n").encode())
  return results


def table(results: dict[str, float], rerank: int) -> list[str]:
  """Lines of text: one per figure and way of ranking, one column per direction and K."""
  row = lambda name, cells: f"{name:40}" + "   ".join("".join(f"{cell:>7}" for cell in some) for some in cells)
  lines = [row("", (["", "", "i2t"], ["", "", "t2i"])), row("", [[f"R@{k}" for k in KS]] * 2)]
  for figure, texts in zip(FIGURES, ("texts with objects", "captions only")):
    for way, ranking in (("itc", "ITC"), ("itm", f"ITM of the {rerank} best")):
      if f"{figure}{way}_i2t_r1" in results:
        lines.append(row(f"{texts}, {ranking}", [[f"{100 * results[f'{figure}{way}_{direction}_r{k}']:.1f}" for k in KS]
                                                 for direction in ("i2t", "t2i")]))
  return lines


if __name__ == "__main__":
  logs.setup()
  flags.DEFINE_string("checkpoint", None, "output directory of a stage-1 run")
  flags.DEFINE_string("records", None, "directory of records that refiner_export wrote")
  flags.DEFINE_integer("rerank", 16, "how many of the best by ITC to rank again by ITM; 0: none")
  flags.DEFINE_string("output", None, "JSON file to write the recalls to")
  settings.run(lambda: evaluate(flags.FLAGS.checkpoint, flags.FLAGS.records, flags.FLAGS.rerank, flags.FLAGS.output))
