"""python -m refiner_export.gallery DIR [--output FILE] [--limit N]: one HTML page that shows exported records."""

import argparse
import base64
import dataclasses
import pathlib
import sys

import jinja2
import numpy as np
from etils import epath

from refiner_export.reader import RecordDirectory
from refiner_export.record import ASSISTANT, BOX_PLACEHOLDER, Record
from refiner_export.settings import UserError, require
from refiner_export.sources import photos
from refiner_export.tfrecord import write_atomically

_TEMPLATE = pathlib.Path(__file__).parent / "gallery.html.jinja"
# Readable both as a line on a photo and behind white text.
_COLOURS = ("#d1495b", "#2a6fdb", "#2e8b57", "#b8651b", "#7b4fc9", "#0f8a8a", "#b03a83",
            "#5f7a17", "#8a5a44", "#4a6572")


@dataclasses.dataclass(frozen=True)
class Box:
  """A box to draw, in percent of the picture."""
  label: str
  colour: str
  left: float
  top: float
  width: float
  height: float


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a text: plain words, or a chip that stands for a box."""
  text: str
  colour: str = ""
  coordinates: str = ""


def render(directory: RecordDirectory, limit: int) -> str:
  """The page, with at most `limit` pictures, as one self-contained HTML text. All texts of records are escaped."""
  environment = jinja2.Environment(
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  credits = photos.credits() if directory.manifest.source == photos.Photos.name else {}
  shown = min(limit, len(directory))
  return environment.from_string(_TEMPLATE.read_text()).render(
      manifest=directory.manifest, shown=shown,
      size=sum(shard.bytes for shard in directory.manifest.shards) / len(directory),
      cards=[_card(directory[position], credits) for position in range(shown)])


def _card(record: Record, credits: dict[str, str]) -> dict:
  boxes = [_box(tag, box, k) for k, (tag, box) in enumerate(zip(record.tags, record.boxes))]
  boxes.sort(key=lambda box: -box.width * box.height)  # small ones are drawn over large ones
  # The captions have their own place on the card.
  conversations = [c for c in record.conversations if c.turns[0].text or c.turns[1].text not in record.captions]
  return {
      "id": record.id, "credit": credits.get(record.id, ""), "width": record.width, "height": record.height,
      "image": base64.b64encode(record.image).decode(), "boxes": boxes, "captions": record.captions,
      "conversations": [
          {"task": conversation.task,
           "turns": [{"answer": turn.role == ASSISTANT, "parts": _parts(turn.text, record)}
                     for turn in conversation.turns]}
          for conversation in conversations],
      "objects": len(record.tags), "rows": len(record.detection_features)}


def _box(label: str, box: np.ndarray, number: int) -> Box:
  x1, y1, x2, y2 = (100 * float(value) for value in box)
  return Box(label, _COLOURS[number % len(_COLOURS)], x1, y1, x2 - x1, y2 - y1)


def _parts(text: str, record: Record) -> list[Part]:
  """Splits a text at its `<box K>`; a box that is also an object's has that object's name and colour."""
  parts = []
  for position, piece in enumerate(BOX_PLACEHOLDER.split(text)):
    if position % 2 == 0:
      parts.append(Part(piece))
      continue
    box = record.text_boxes[int(piece)]
    same = np.flatnonzero(np.isclose(record.boxes, box, atol=1e-6).all(axis=1))
    coordinates = "[" + ", ".join(f"{value:.3f}" for value in box) + "]"
    parts.append(Part(record.tags[same[0]], _COLOURS[same[0] % len(_COLOURS)], coordinates) if len(same)
                 else Part("box", "#6b7280", coordinates))
  return parts


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise UserError(f"{message} (usage: python -m refiner_export.gallery DIR [--output FILE] [--limit N])")


def main(arguments: list[str]) -> None:
  parser = _Parser(prog="python -m refiner_export.gallery", description="One HTML page that shows exported records.")
  parser.add_argument("directory", metavar="DIR", help="a directory that python -m refiner_export wrote")
  parser.add_argument("--output", metavar="FILE", help="the page to write; DIR/gallery.html by default")
  parser.add_argument("--limit", type=int, default=100, help="show at most so many pictures")
  options = parser.parse_args(arguments)
  require(options.limit >= 1, f"--limit: expected at least 1, got {options.limit}")
  output = epath.Path(options.output) if options.output else epath.Path(options.directory) / "gallery.html"
  page = render(RecordDirectory(options.directory), options.limit)
  require(output.parent.is_dir(), f"--output: no such directory: {output.parent}")
  write_atomically(output, page.encode())
  print(output)


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
