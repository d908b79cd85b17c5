"""Asks a trained vision-language model the questions of records, and scores and shows its answers.

Writes `predictions.jsonl`, `scores.json`, `answers.html` and `losses.png` into the output directory.
"""

import json
from collections.abc import Sequence

from etils import epath

from lyrics_jax.evaluation import report
from lyrics_jax.evaluation.questions import Answered, ask, first_questions, summarise
from lyrics_jax.inference.generator import Generator
from lyrics_jax.inference.loaded import LoadedModel, parse_mesh, require_model
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common.command import Command, Flag
from refiner_export.common.files import write_atomically
from refiner_export.common.settings import require
from refiner_export.pages import curves as curves_page
from refiner_export.records.reader import RecordDirectory

_WRITTEN = ("record", "task", "kind", "question", "answer", "prediction", "score")  # of an answer, in predictions.jsonl


def evaluate(checkpoint: str, records: str, output: str, mesh: str | None = None) -> None:
  """Writes the four files and prints the outcome. Raises `UserError`."""
  # --- what is there: whatever is missing is said before the model is loaded ---
  config = saved_config(checkpoint)
  require_model(config, VLMSettings, f"{checkpoint}: this command")
  trained = trained_manifest(checkpoint, config)
  directory = RecordDirectory(records, trained.fingerprint)
  curves = report.read_curves(checkpoint)
  tasks = config.data.rows.tasks
  questions = list(first_questions(directory, tasks))
  require(bool(questions), f"--records={records}: no record has a question, so there is nothing to ask")

  # --- ask and score ---
  generator = Generator(LoadedModel.open(checkpoint, parse_mesh(mesh)))
  answered = ask(generator, directory, questions)
  summary = summarise(answered, tasks)
  trained_on = trained == directory.manifest

  # --- write and tell ---
  folder = epath.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  scores = summary | {"records": len(directory), "trained_on_these_records": trained_on}
  page = report.page(directory, answered, summary, trained_on, checkpoint)
  panels = [run.panel for run in curves]
  write_atomically(folder / "predictions.jsonl", _predictions(answered))
  write_atomically(folder / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())
  write_atomically(folder / "answers.html", page.encode())
  write_atomically(folder / "losses.png", curves_page.draw(panels))
  for line in report.lines(summary, curves, trained_on):
    print(line)
  print(f"loss curves: {folder / 'losses.png'}")
  print(f"answers with predicted boxes: {folder / 'answers.html'}", flush=True)


def _predictions(answered: Sequence[Answered]) -> bytes:
  """One JSON object per line and answer."""
  lines = []
  for answer in answered:
    values = {name: getattr(answer, name) for name in _WRITTEN}
    lines.append(json.dumps(values, ensure_ascii=False) + "\n")
  return "".join(lines).encode()


COMMAND = Command(
    name="lyrics_jax.evaluate",
    about=__doc__,
    main=evaluate,
    flags=(
        Flag("checkpoint", "output directory of a run that trained a vision-language model", metavar="RUN",
             required=True),
        Flag("records", "directory of records that refiner_export wrote", metavar="DIR", required=True),
        Flag("output", "directory to write the results to", metavar="DIR", required=True),
        Flag("mesh", "devices per mesh axis; without it, one device computes", metavar="DATA,FSDP,TENSOR"),
    ),
    examples=("python -m lyrics_jax.evaluate --checkpoint RUN --records DIR --output ANSWERS",),
)

if __name__ == "__main__":
  COMMAND.run()
