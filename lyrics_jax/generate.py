"""Answers free prompts about one picture, a record's or a photo's:

  python -m lyrics_jax.generate --checkpoint=RUN --record=DIR#K --prompt="What is in the photo?" [--prompt=...]
  python -m lyrics_jax.generate --checkpoint=RUN --image=photo.jpg --prompt="Where is the cup?" --output=picture.png

`K` counts from 0. `--output` draws the boxes that the answers name over the picture.
"""

from collections.abc import Sequence

from absl import flags
from etils import epath

from lyrics_jax import logs
from lyrics_jax.data.spatial import parse_boxes
from lyrics_jax.evaluation.answerer import Answerer
from lyrics_jax.evaluation.record_name import read_record
from lyrics_jax.evaluation.drawing import draw_boxes, picture_format
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common import settings
from refiner_export.export.config import refiner_from_manifest
from refiner_export.export.images import UnreadableImage
from refiner_export.records.manifest import Manifest
from refiner_export.export.pipeline import refine_photo
from refiner_export.records.record import Record
from refiner_export.common.settings import UserError, existing_path, require
from refiner_export.common.files import write_atomically

_LARGEST_BATCH = 8


def generate(checkpoint: str, prompts: Sequence[str], record: str | None = None, image: str | None = None,
             output: str | None = None, refiner_files: Sequence[str] = ()) -> list[str]:
  """Prints every prompt with its answer, and returns the answers. Raises `UserError`."""
  # --- what is asked of what ---
  require(bool(checkpoint), "--checkpoint is required: name the output directory of a stage-2 run")
  asked = bool(prompts) and all(prompt.strip() for prompt in prompts)
  require(asked, '--prompt is required, for example --prompt "What is this?"')
  require(bool(record) != bool(image), "name one picture: either --record DIR#K or --image photo.jpg")
  if output:
    drawn_as = picture_format(output)
    existing_path(epath.Path(output).parent, "directory of --output", "Make it first.")
  manifest = trained_manifest(checkpoint, saved_config(checkpoint))
  picture = read_record(record, manifest.fingerprint) if record else _refine_image(image, manifest, refiner_files)
  require(bool(picture.image) or not output, f"--output: record {picture.id} has no picture to draw on")

  # --- ask ---
  answers = Answerer(checkpoint, min(len(prompts), _LARGEST_BATCH)).answer([(picture, prompt) for prompt in prompts])
  for prompt, answer in zip(prompts, answers):
    print(f"{prompt}\n  {answer or '(no answer)'}")

  # --- draw ---
  if output:
    boxes = [parse_boxes(answer) for answer in answers]
    write_atomically(epath.Path(output), draw_boxes(picture.image, boxes, drawn_as))
    print(f"{sum(map(len, boxes))} boxes drawn: {output}", flush=True)
  return answers


def _refine_image(path: str, manifest: Manifest, refiner_files: Sequence[str]) -> Record:
  """A photo's record, with features by the refiner that made the records of the training."""
  file = existing_path(path, "--image", "Name a picture file.")
  require(not file.is_dir(), f"--image={path} is a directory: name a picture file")
  named = [entry.partition("=") for entry in refiner_files]
  require(all(separator for _, separator, _ in named), "--refiner_file: expected PART.FIELD=PATH, such as tagger.checkpoint=ram.pth")
  refiner = refiner_from_manifest(manifest, {field: path for field, _, path in named}).build()
  try:
    return manifest.as_read(refine_photo(file.read_bytes(), refiner))
  except UnreadableImage as error:
    raise UserError(f"--image={path} cannot be read: {error.reason}") from error


if __name__ == "__main__":
  logs.setup()
  flags.DEFINE_string("checkpoint", None, "output directory of a stage-2 run")
  flags.DEFINE_string("record", None, "DIR#K: record K, counted from 0, of a directory that refiner_export wrote")
  flags.DEFINE_string("image", None, "a photo")
  flags.DEFINE_multi_string("prompt", [], "what to ask; may be given several times")
  flags.DEFINE_string("output", None, "picture file to write: the photo with the boxes of the answers")
  flags.DEFINE_multi_string("refiner_file", [], "of a neural refiner, for --image: PART.FIELD=PATH, such as tagger.checkpoint=ram.pth")
  settings.run(lambda: generate(flags.FLAGS.checkpoint, flags.FLAGS.prompt, flags.FLAGS.record, flags.FLAGS.image,
                                flags.FLAGS.output, flags.FLAGS.refiner_file))
