"""python -m refiner_export.pages.gallery DIR [--output FILE] [--limit N]: one HTML page that shows exported records."""

import argparse
import pathlib
import sys

from etils import epath

from refiner_export.pages import page
from refiner_export.records.manifest import Manifest
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import ASSISTANT, Record
from refiner_export.common.settings import UserError, require
from refiner_export.common.files import write_atomically

_TEMPLATE = pathlib.Path(__file__).parent / "gallery.html.jinja"


def render(directory: RecordDirectory, limit: int) -> str:
  """The page, with at most `limit` pictures, as one self-contained HTML text. All texts of records are escaped."""
  manifest, shown = directory.manifest, min(limit, len(directory))
  return page.render(
      _TEMPLATE, manifest=manifest, shown=shown, records=len(directory),
      cards=[_card(directory[position], manifest) for position in range(shown)])


def _card(record: Record, manifest: Manifest) -> dict:
  boxes = [page.Box.of(box, f"{tag} {score:.2f}", page.object_colour(k), note=_note(record, k))
           for k, (tag, box, score) in enumerate(zip(record.tags, record.boxes, record.scores))]
  # The captions have their own place on the card.
  conversations = [c for c in record.conversations if c.turns[0].text or c.turns[1].text not in record.captions]
  return page.card(record, boxes, manifest) | {
      "overlay": page.draw_masks(record),
      "captions": record.captions,
      "conversations": [
          {"task": conversation.task,
           "turns": [{"answer": turn.role == ASSISTANT, "parts": page.text_parts(turn.text, record)}
                     for turn in conversation.turns]}
          for conversation in conversations],
      "objects": len(record.tags)}


def _note(record: Record, k: int) -> str:
  """What is known of the mask of object k."""
  iou = f"predicted IoU {record.mask_ious[k]:.2f}" if len(record.mask_ious) else ""
  area = f"{record.mask_areas[k]:.1%} of the picture" if len(record.mask_areas) else ""
  return ", ".join(filter(None, (iou, area)))


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise UserError(f"{message} (usage: python -m refiner_export.pages.gallery DIR [--output FILE] [--limit N])")


def main(arguments: list[str]) -> None:
  parser = _Parser(prog="python -m refiner_export.pages.gallery", description="One HTML page that shows exported records.")
  parser.add_argument("directory", metavar="DIR", help="a directory that python -m refiner_export wrote")
  parser.add_argument("--output", metavar="FILE", help="the page to write; DIR/gallery.html by default")
  parser.add_argument("--limit", type=int, default=100, help="show at most so many pictures")
  options = parser.parse_args(arguments)
  require(options.limit >= 1, f"--limit: expected at least 1, got {options.limit}")
  output = epath.Path(options.output) if options.output else epath.Path(options.directory) / "gallery.html"
  text = render(RecordDirectory(options.directory), options.limit)
  require(output.parent.is_dir(), f"--output: no such directory: {output.parent}")
  write_atomically(output, text.encode())
  print(output)


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
