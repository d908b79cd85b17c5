"""Draws where the queries of a run look in a record's picture.

The figure shows the weights of the Q-Former's cross-attention: those of the visual queries over the picture's patches,
and those of the grounding queries over the boxes of the refiner's tokens. A run of either stage will do.
"""

import jax
import numpy as np
from etils import epath
from flax import nnx

from lyrics_jax.data.batch import Batch
from lyrics_jax.data.errors import about
from lyrics_jax.data.pictures import PictureInputs
from lyrics_jax.evaluation.questions import read_record
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.models.connectors.cross_attention_weights import CrossAttention, cross_attention_weights
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.inputs import Pictures
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common.command import Command, Flag
from refiner_export.common.files import write_atomically
from refiner_export.common.settings import existing_path, require
from refiner_export.pages import attention as figure


def attention(checkpoint: str, record: str, output: str) -> None:
  """Writes the figure. Raises `UserError`."""
  # --- what is drawn ---
  require(output.lower().endswith(".png"), f"--output={output}: the figure is a PNG: name a .png file")
  existing_path(epath.Path(output).parent, "directory of --output", "Make it first.")
  config = saved_config(checkpoint)
  connector = config.stage.model.connector_settings
  require(isinstance(connector, QFormerSettings),
          f"--checkpoint={checkpoint}: its connector, {type(connector).__name__}, has no queries: name another run")
  shown = read_record(record, trained_manifest(checkpoint, config).fingerprint)
  require(len(shown.pictures) == 1,
          f"--record={record}: it has {len(shown.pictures)} pictures: name a record with a single one")
  inputs = PictureInputs(config.data, config.fields, config.dimensions)
  with about(shown):
    arrays = inputs.arrays(shown.picture, inputs.whole(shown.picture))

  # --- the weights ---
  batch = {name: value[None, None] for name, value in arrays.items()}  # one row with one picture
  weights = jax.device_get(LoadedModel.open(checkpoint).compiled(_weights)(batch))

  # --- the figure ---
  boxes, mask_boxes, masks_mask = _boxes(arrays)
  tokens = figure.tokens(shown.picture, boxes, mask_boxes, masks_mask)
  title = f"Where the queries look in {shown.id}   ({checkpoint}; heads averaged)"
  picture = figure.draw(shown.picture, tokens, weights.visual[:, 0], weights.grounding[:, 0],
                        connector.former.cross_attention_frequency, title)
  write_atomically(epath.Path(output), picture)
  print(f"attention of {shown.id}: {output}", flush=True)


def _weights(model: nnx.Module, batch: Batch) -> CrossAttention:
  """Of an aligner or a vision-language model, whose connector is a Q-Former."""
  pictures = model.connector.key_values(model.see(Pictures.of(batch)))
  return cross_attention_weights(model.connector.former, pictures)


def _boxes(arrays: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Boxes of detection rows and of mask tokens, (n, 4) cxcywh, and which mask tokens are valid.

  All are empty where the model reads no local tokens.
  """
  if "detection" not in arrays:
    return np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32), np.zeros(0, bool)
  return arrays["detection"][:, -4:], arrays["masks"][:, -4:], arrays["masks_mask"]


COMMAND = Command(
    name="lyrics_jax.attention",
    about=__doc__,
    main=attention,
    flags=(
        Flag("checkpoint", "output directory of a run", metavar="RUN", required=True),
        Flag("record", "record K, counted from 0, of a directory that refiner_export wrote", metavar="DIR#K",
             required=True),
        Flag("output", "PNG file to write", metavar="FILE.png", required=True),
    ),
    examples=("python -m lyrics_jax.attention --checkpoint RUN --record DIR#0 --output attention.png",),
)

if __name__ == "__main__":
  COMMAND.run()
