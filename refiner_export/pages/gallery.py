"""Writes one HTML page that shows exported records: pictures with objects and masks, captions and conversations.

The page has a search, filters by tag and by the reason why an example was skipped, and pages. It needs no server.
"""

import collections
import json
import random
from collections.abc import Iterable, Sequence

from etils import epath

from refiner_export.common.command import Command, Flag, Positional
from refiner_export.common.files import write_atomically
from refiner_export.common.settings import require
from refiner_export.pages import page
from refiner_export.records.manifest import ERRORS, Manifest
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import ASSISTANT, Conversation, Picture, Record


def render(directory: RecordDirectory, limit: int, seed: int | None = None) -> str:
  """The page, with at most `limit` records, as one self-contained HTML text. All texts of records are escaped.

  Args:
    directory: the records.
    limit: how many of them are shown, and how many of the skipped examples.
    seed: shows records that are drawn at random by this seed; None shows the first.
  """
  positions = range(min(limit, len(directory)))
  if seed is not None:
    positions = sorted(random.Random(seed).sample(range(len(directory)), len(positions)))
  records = [directory[position] for position in positions]
  skipped = _read_skipped(directory.path / ERRORS, limit)
  return render_records(directory.manifest, records, skipped, len(directory), seed is not None)


def render_records(
    manifest: Manifest, records: Sequence[Record], skipped: Sequence[dict], total: int, drawn: bool = False,
) -> str:
  """The page of these records, which are some of `total`, and of skipped examples: `id` and `reason` of each."""
  cards, tags, reasons = [], collections.Counter(), collections.Counter()
  for record in records:
    cards.append(_card(record))
    tags.update(cards[-1]["tags"])
  shown = [_skipped(example) for example in skipped]
  for example in shown:
    reasons[example["group"]] += 1
  return page.render(
      "gallery.html.jinja", manifest=manifest, shown=len(cards), records=total, drawn=drawn, cards=cards, skipped=shown,
      tags=tags.most_common(), reasons=reasons.most_common())


def _read_skipped(path: epath.Path, limit: int) -> list[dict]:
  """The first lines of `errors.jsonl`; none where there is no such file."""
  skipped = []
  try:
    for line in path.read_text().splitlines()[:limit]:
      skipped.append(json.loads(line))
  except (OSError, ValueError):  # the page is about records
    return []
  return skipped


def _skipped(example: dict) -> dict:
  """An example as the page shows it. Reasons are grouped by what stands before their details."""
  id, reason = str(example.get("id", "")), str(example.get("reason", ""))
  return {"id": id, "reason": reason, "group": reason.partition(":")[0], "searched": f"{id} {reason}".lower()}


def _card(record: Record) -> dict:
  photos, about, tags = [], [], []
  for picture in record.pictures:
    photos.append(_photo(picture, alt=record.captions[0] if record.captions else record.id))
    about.append(f"{picture.width}x{picture.height}, {len(picture.tags)} objects")
    tags += picture.tags
  conversations = []
  for conversation in record.conversations:
    if not _is_caption(conversation, record):  # a card shows captions in their own place
      conversations.append({"task": conversation.task, "turns": _turns(conversation, record)})
  return {"id": record.id, "photos": photos, "about": "; ".join(about) or "text alone", "captions": record.captions,
          "conversations": conversations, "credit": page.credits(record), "tags": sorted(set(tags)),
          "searched": " ".join(_texts(record)).lower()}


def _texts(record: Record) -> Iterable[str]:
  """What a search looks through."""
  yield record.id
  yield from record.captions
  for picture in record.pictures:
    yield from picture.tags
  for conversation in record.conversations:
    yield conversation.task
    for turn in conversation.turns:
      yield turn.text


def _photo(picture: Picture, alt: str) -> dict:
  boxes = []
  for k, (tag, box, score) in enumerate(zip(picture.tags, picture.boxes, picture.scores)):
    boxes.append(page.Box.of(box, f"{tag} {score:.2f}", page.object_colour(k), note=_note(picture, k), number=k))
  return page.photo(picture, boxes, alt, page.draw_masks(picture))


def _note(picture: Picture, k: int) -> str:
  """What is known of the mask of object k."""
  known = []
  if len(picture.mask_ious):
    known.append(f"predicted IoU {picture.mask_ious[k]:.2f}")
  if len(picture.mask_areas):
    known.append(f"{picture.mask_areas[k]:.1%} of the picture")
  return ", ".join(known)


def _is_caption(conversation: Conversation, record: Record) -> bool:
  question, answer = conversation.turns[:2]
  return not question.text and answer.text in record.captions


def _turns(conversation: Conversation, record: Record) -> list[dict]:
  turns = []
  for turn in conversation.turns:
    turns.append({"answer": turn.role == ASSISTANT, "parts": page.text_parts(turn.text, record)})
  return turns


def main(directory: str, output: str | None, limit: int, random: int) -> None:
  """Writes the page and prints its name. Raises `UserError`."""
  file = epath.Path(output) if output else epath.Path(directory) / "gallery.html"
  text = render(RecordDirectory(directory), limit, random or None)
  require(file.parent.is_dir(), f"--output: no such directory: {file.parent}")
  write_atomically(file, text.encode())
  print(file)


COMMAND = Command(
    name="refiner_export gallery",
    about=__doc__,
    main=main,
    flags=(
        Flag("output", "the page to write; DIR/gallery.html by default", metavar="FILE"),
        Flag("limit", "show at most so many records", default=100, at_least=1),
        Flag("random", "show records that are drawn at random, others for each number; 0 shows the first", default=0,
             metavar="SEED", at_least=0),
    ),
    positional=(Positional("directory", "DIR", "a directory that python -m refiner_export wrote"),),
    examples=("python -m refiner_export gallery DIR",
              "python -m refiner_export gallery DIR --output page.html --limit 20 --random 1"),
)

if __name__ == "__main__":
  COMMAND.run()
