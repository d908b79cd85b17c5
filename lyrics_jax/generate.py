"""Answers free prompts about a record, or about a photo.

A photo is refined first, as the records of the training were. A prompt may point at a box of the record by `<box K>`,
or by `<box I.K>` where the record has several pictures. With --output, the boxes of the answers are drawn on the
picture.
"""

import re
from collections.abc import Sequence

from etils import epath

from lyrics_jax.data.spatial import parse_boxes
from lyrics_jax.evaluation.questions import read_record
from lyrics_jax.inference.generator import Generator
from lyrics_jax.inference.loaded import LoadedModel, parse_mesh
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.training.checkpoint import saved_config, trained_manifest
from refiner_export.common.command import Command, Flag
from refiner_export.common.files import write_atomically
from refiner_export.common.settings import UserError, existing_path, require
from refiner_export.export.config import refiner_from_manifest
from refiner_export.common.images import UnreadableImage
from refiner_export.export.pipeline import refine_photo
from refiner_export.pages.drawing import draw_boxes, picture_format
from refiner_export.records.manifest import Manifest
from refiner_export.records.record import Record

_LARGEST_BATCH = 8
_BOX_OF_FIRST_PICTURE = re.compile(r"<box (\d+)>")


def generate(checkpoint: str, prompt: Sequence[str], record: str | None = None, image: str | None = None,
             output: str | None = None, refiner_file: Sequence[str] = (), mesh: str | None = None) -> list[str]:
  """Prints each prompt with its answer, and returns the answers. Raises `UserError`."""
  # --- what is asked of what ---
  asked = bool(prompt) and all(text.strip() for text in prompt)
  require(asked, '--prompt is required, for example --prompt "What is this?"')
  require(bool(record) != bool(image), "name one picture: either --record DIR#K or --image photo.jpg")
  if output:
    drawn_as = picture_format(output)
    existing_path(epath.Path(output).parent, "directory of --output", "Make it first.")
  manifest = trained_manifest(checkpoint, saved_config(checkpoint))
  subject = read_record(record, manifest.fingerprint) if record else _refine_image(image, manifest, refiner_file)
  require(len(subject.pictures) == 1 or not output,
          f"--output: record {subject.id} has {len(subject.pictures)} pictures: boxes are drawn on a single one")

  # --- ask ---
  loaded = LoadedModel.open(checkpoint, parse_mesh(mesh), VLMSettings)
  generator = Generator(loaded, min(len(prompt), _LARGEST_BATCH))
  questions = []
  for text in prompt:
    questions.append((subject, _BOX_OF_FIRST_PICTURE.sub(r"<box 0.\1>", text)))
  answers = generator.answer(questions)
  for text, answer in zip(prompt, answers):
    print(f"{text}\n  {answer or '(no answer)'}")

  # --- draw ---
  if output:
    boxes = [parse_boxes(answer) for answer in answers]
    write_atomically(epath.Path(output), draw_boxes(subject.picture.image, boxes, drawn_as))
    print(f"{sum(map(len, boxes))} boxes drawn: {output}", flush=True)
  return answers


def _refine_image(path: str, manifest: Manifest, refiner_files: Sequence[str]) -> Record:
  """A photo's record, with features by the refiner that made the records of the training."""
  file = existing_path(path, "--image", "Name a picture file.")
  require(not file.is_dir(), f"--image={path} is a directory: name a picture file")
  files = {}
  for entry in refiner_files:
    field, separator, name = entry.partition("=")
    require(bool(separator), "--refiner-file: expected PART.FIELD=PATH, such as tagger.checkpoint=ram.pth")
    files[field] = name
  refiner = refiner_from_manifest(manifest, files).build()
  try:
    return manifest.as_read(refine_photo(file.read_bytes(), refiner))
  except UnreadableImage as error:
    raise UserError(f"--image={path} cannot be read: {error.reason}") from error


COMMAND = Command(
    name="lyrics_jax.generate",
    about=__doc__,
    main=generate,
    flags=(
        Flag("checkpoint", "output directory of a run that trained a language model with pictures", metavar="RUN",
             required=True),
        Flag("prompt", "what to ask", default=(), metavar="TEXT"),
        Flag("record", "record K, counted from 0, of a directory that refiner_export wrote", metavar="DIR#K"),
        Flag("image", "a photo", metavar="FILE"),
        Flag("output", "picture file to write: the picture with the boxes of the answers", metavar="FILE"),
        Flag("refiner-file", "file of a neural refiner for --image, such as tagger.checkpoint=ram.pth",
             default=(), metavar="PART.FIELD=PATH"),
        Flag("mesh", "devices per mesh axis; without it, one device computes", metavar="DATA,FSDP,TENSOR"),
    ),
    examples=("python -m lyrics_jax.generate --checkpoint RUN --record DIR#0 --prompt 'What is in the photo?'",
              "python -m lyrics_jax.generate --checkpoint RUN --image photo.jpg --prompt 'Where is the cup?' "
              "--output picture.png"),
)

if __name__ == "__main__":
  COMMAND.run()
