"""Writes one HTML page that shows exported records: pictures with objects and masks, captions and conversations."""

from etils import epath

from refiner_export.common.command import Command, Flag, Positional
from refiner_export.common.files import write_atomically
from refiner_export.common.settings import require
from refiner_export.pages import page
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import ASSISTANT, Conversation, Picture, Record


def render(directory: RecordDirectory, limit: int) -> str:
  """The page, with at most `limit` records, as one self-contained HTML text. All texts of records are escaped."""
  shown = min(limit, len(directory))
  cards = []
  for position in range(shown):
    cards.append(_card(directory[position]))
  return page.render(
      "gallery.html.jinja", manifest=directory.manifest, shown=shown, records=len(directory), cards=cards)


def _card(record: Record) -> dict:
  photos, about = [], []
  for picture in record.pictures:
    photos.append(_photo(picture, alt=record.captions[0] if record.captions else record.id))
    about.append(f"{picture.width}x{picture.height}, {len(picture.tags)} objects")
  conversations = []
  for conversation in record.conversations:
    if not _is_caption(conversation, record):  # a card shows captions in their own place
      conversations.append({"task": conversation.task, "turns": _turns(conversation, record)})
  return {"id": record.id, "photos": photos, "about": "; ".join(about) or "text alone", "captions": record.captions,
          "conversations": conversations, "credit": page.credits(record)}


def _photo(picture: Picture, alt: str) -> dict:
  boxes = []
  for k, (tag, box, score) in enumerate(zip(picture.tags, picture.boxes, picture.scores)):
    boxes.append(page.Box.of(box, f"{tag} {score:.2f}", page.object_colour(k), note=_note(picture, k)))
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


def main(directory: str, output: str | None, limit: int) -> None:
  """Writes the page and prints its name. Raises `UserError`."""
  file = epath.Path(output) if output else epath.Path(directory) / "gallery.html"
  text = render(RecordDirectory(directory), limit)
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
    ),
    positional=(Positional("directory", "DIR", "a directory that python -m refiner_export wrote"),),
    examples=("python -m refiner_export gallery DIR",
              "python -m refiner_export gallery DIR --output page.html --limit 20"),
)

if __name__ == "__main__":
  COMMAND.run()
