"""Asks a stage-2 run every record's own questions, and scores and shows its answers:

  python -m lyrics_jax.evaluate --checkpoint=RUN --records=DIR --output=DIR

writes `predictions.jsonl`, `scores.json`, `answers.html` and `losses.png` into the output directory.
"""

import json

from absl import flags
from etils import epath

from lyrics_jax import logs
from lyrics_jax.evaluation import curves, report
from lyrics_jax.evaluation.answerer import Answerer
from lyrics_jax.evaluation.progress import chunks
from lyrics_jax.evaluation.questions import Answered, first_questions, judge, summarise
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common import settings
from refiner_export.records.reader import RecordDirectory
from refiner_export.common.settings import require
from refiner_export.common.files import write_atomically

_WRITTEN = ("record", "task", "kind", "question", "answer", "prediction", "score")  # of each answer, in predictions.jsonl


def evaluate(checkpoint: str, records: str, output: str) -> None:
  """Writes the four files and prints the outcome. Raises `UserError`."""
  # --- what is there: whatever is missing shall be said before the model is loaded ---
  require(bool(checkpoint), "--checkpoint is required: name the output directory of a stage-2 run")
  require(bool(records), "--records is required: name a directory that refiner_export wrote")
  require(bool(output), "--output is required: name a directory for the results")
  trained = trained_manifest(checkpoint, saved_config(checkpoint))
  directory = RecordDirectory(records, trained.fingerprint)
  losses = curves.read_curves(checkpoint)
  questions = list(first_questions(directory))
  require(bool(questions), f"--records={records}: no record has a conversation, so there is nothing to ask")

  # --- ask and score ---
  answerer = Answerer(checkpoint)
  answered: list[Answered] = []
  for chunk in chunks(questions, answerer.batch_size, "question"):
    about = [directory[question.position] for question in chunk]
    predictions = answerer.answer([(record, question.text) for record, question in zip(about, chunk)])
    answered += [judge(question, record, prediction, answerer.config.data.coordinates)
                 for question, record, prediction in zip(chunk, about, predictions)]
  summary = summarise(answered)
  trained_on = trained == directory.manifest

  # --- write and tell ---
  folder = epath.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  predictions = [{name: getattr(each, name) for name in _WRITTEN} for each in answered]
  scores = summary | {"records": len(directory), "trained_on_these_records": trained_on}
  for name, contents in {
      "predictions.jsonl": "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions).encode(),
      "scores.json": (json.dumps(scores, indent=2) + "\n").encode(),
      "answers.html": report.render(directory, answered, summary, trained_on, checkpoint).encode(),
      "losses.png": curves.draw(losses),
  }.items():
    write_atomically(folder / name, contents)
  for line in report.lines(summary, losses, trained_on):
    print(line)
  print(f"loss curves: {folder / 'losses.png'}")
  print(f"answers with predicted boxes: {folder / 'answers.html'}", flush=True)


if __name__ == "__main__":
  logs.setup()
  flags.DEFINE_string("checkpoint", None, "output directory of a stage-2 run")
  flags.DEFINE_string("records", None, "directory of records that refiner_export wrote")
  flags.DEFINE_string("output", None, "directory to write the results to")
  settings.run(lambda: evaluate(flags.FLAGS.checkpoint, flags.FLAGS.records, flags.FLAGS.output))
