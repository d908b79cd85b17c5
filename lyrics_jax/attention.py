"""Draws where the queries of a run look in a record's photo:

  python -m lyrics_jax.attention --checkpoint=RUN --record=DIR#K --output=FILE.png

A run of either stage will do; `K` counts from 0. What is drawn is in `evaluation/attention_picture.py`, and what of the
model it shows in `evaluation/attention_maps.py`.
"""

import numpy as np
from absl import flags
from etils import epath

from lyrics_jax import logs
from lyrics_jax.data.errors import about
from lyrics_jax.data.images import View
from lyrics_jax.data.visual import visual_inputs
from lyrics_jax.evaluation.attention_maps import cross_attention_weights
from lyrics_jax.evaluation.attention_picture import draw
from lyrics_jax.evaluation.record_name import read_record
from lyrics_jax.evaluation.trained import TrainedModel
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common import settings
from refiner_export.common.settings import existing_path, require
from refiner_export.common.files import write_atomically


def attention(checkpoint: str, record: str, output: str) -> None:
  """Writes the figure. Raises `UserError`."""
  require(bool(checkpoint), "--checkpoint is required: name the output directory of a run")
  require(bool(record), "--record is required: name a record, DIR#K")
  require(bool(output), "--output is required: name a .png file to write")
  require(output.lower().endswith(".png"), f"--output={output}: the figure is a PNG: name a .png file")
  existing_path(epath.Path(output).parent, "directory of --output", "Make it first.")
  config = saved_config(checkpoint)
  shown = read_record(record, trained_manifest(checkpoint, config).fingerprint)
  require(bool(shown.image), f"--record={record}: it has no picture: name one with a photo")
  with about(shown):
    inputs = visual_inputs(shown, View(), config.model)

  model = TrainedModel(checkpoint)
  weights = model.compiled(lambda module, batch: cross_attention_weights(
      module.perception.mq_former, module.perception.look(batch)))({name: value[None] for name, value in inputs.items()})

  title = f"Where the queries look in {shown.id}   ({checkpoint}, stage {config.stage}; heads averaged)"
  picture = draw(shown, inputs, np.asarray(weights.visual[:, 0]), np.asarray(weights.grounding[:, 0]),
                 config.model.mq_former.cross_attention_frequency, title)
  write_atomically(epath.Path(output), picture)
  print(f"attention of {shown.id}: {output}", flush=True)


if __name__ == "__main__":
  logs.setup()
  flags.DEFINE_string("checkpoint", None, "output directory of a run of either stage")
  flags.DEFINE_string("record", None, "DIR#K: record K, counted from 0, of a directory that refiner_export wrote")
  flags.DEFINE_string("output", None, "PNG file to write")
  settings.run(lambda: attention(flags.FLAGS.checkpoint, flags.FLAGS.record, flags.FLAGS.output))
