"""The record: pictures with their objects and refiner features, and the texts about them.

Boxes of objects and of texts are `xyxy` corners in [0, 1] of the stored picture. Boxes of detector rows are
`cxcywh` in [0, 1], as Grounding-DINO gives them. The turns of conversations point at pictures by `<image K>`,
K an index into `pictures`, and at boxes by `<box I.K>`, K an index into the `text_boxes` of picture I.
Placeholders let augmentation move a box without touching the text.
"""

import dataclasses
import re

import numpy as np

from refiner_export.common.settings import UserError
from refiner_export.records.features import FEATURE_WIDTH

OPTIONAL_FIELDS = ("mask_ious", "mask_areas", "mask_rles")  # a manifest names those that its records have
IMAGE_PLACEHOLDER = re.compile(r"<image (\d+)>")
BOX_PLACEHOLDER = re.compile(r"<box (\d+)\.(\d+)>")
USER, ASSISTANT = "user", "assistant"
CAPTION = "caption"  # the task of conversations that are made of a record's captions

_LOOKS_LIKE_PLACEHOLDER = re.compile(r"<(?=(?:image|box) \d)")
_BOX_WITHOUT_PICTURE = re.compile(r"<box (\d+)>")  # how schema 1 wrote a placeholder


class RecordError(UserError):
  """A record cannot be read or does not fit together; the message says where it lies and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Turn:
  """One utterance: `role` is `user` or `assistant`; `text` may hold `<image K>` and `<box I.K>` placeholders."""
  role: str
  text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Alternating turns, user first; `task` names the instruction family, e.g. `vqa` or `rec`."""
  task: str
  turns: tuple[Turn, ...]


def _no_numbers() -> np.ndarray:
  return np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True)
class Picture:
  """One picture with K objects, N detector rows and M boxes in texts; all arrays are float32."""
  image: bytes                       # JPEG, EXIF orientation already applied
  height: int                        # pixels of the stored picture
  width: int
  tags: tuple[str, ...]              # K, lower case
  boxes: np.ndarray                  # (K, 4) xyxy, in descending score
  scores: np.ndarray                 # (K,)
  detection_features: np.ndarray     # (N, 256), in descending score
  detection_boxes: np.ndarray        # (N, 4) cxcywh
  mask_features: np.ndarray          # (K, 256), one per object
  text_boxes: np.ndarray             # (M, 4) xyxy
  # The optional fields have K entries, or none where they were not kept.
  mask_ious: np.ndarray = dataclasses.field(default_factory=_no_numbers)   # how well a mask fits, by the segmenter
  mask_areas: np.ndarray = dataclasses.field(default_factory=_no_numbers)  # share of the picture that a mask covers
  mask_rles: tuple[bytes, ...] = ()  # COCO's compressed run-length codes of masks of `height` by `width` pixels
  credit: str = ""                   # whom to thank for the picture; pages show it


@dataclasses.dataclass(frozen=True)
class Record:
  """One example: its pictures in order, and its texts. A record of text alone has no picture."""
  id: str
  source: str
  pictures: tuple[Picture, ...]
  captions: tuple[str, ...]
  conversations: tuple[Conversation, ...]

  @property
  def picture(self) -> Picture:
    """The only picture. Raises `RecordError` for a record with none or with several."""
    if len(self.pictures) != 1:
      raise RecordError(f"record {self.id}: expected one picture, it has {len(self.pictures)}")
    return self.pictures[0]


def conversation_items(record: Record) -> tuple[Conversation, ...]:
  """All that a record can teach as a conversation: its conversations, then one of task `caption` for each caption.

  A caption is left out when a stored conversation of task `caption` has it as its answer: records of schema 1 have
  such conversations.
  """
  said = set()
  for conversation in record.conversations:
    if conversation.task == CAPTION:
      said.add(conversation.turns[-1].text)
  captions = []
  for caption in record.captions:
    if caption not in said:
      captions.append(Conversation(CAPTION, (Turn(USER, ""), Turn(ASSISTANT, caption))))
  return (*record.conversations, *captions)


def image_placeholder(picture: int) -> str:
  """What stands in a text for a picture of the record."""
  return f"<image {picture}>"


def box_placeholder(picture: int, box: int) -> str:
  """What stands in a text for a box of a picture of the record."""
  return f"<box {picture}.{box}>"


def is_text(value: object) -> bool:
  """Whether a value is a text that can be written: half a surrogate pair cannot."""
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def escape(text: str) -> str:
  """A text from outside, as it may stand in a record: what looks like a placeholder gets a space and is none then."""
  return _LOOKS_LIKE_PLACEHOLDER.sub("< ", text)


def check(record: Record) -> None:
  """Raises `RecordError` when the parts of a record do not fit together."""
  for number, picture in enumerate(record.pictures):
    _check_picture(picture, f"record {record.id}: picture {number}")
  for conversation in record.conversations:
    roles = [turn.role for turn in conversation.turns]
    if roles != [USER, ASSISTANT] * (len(roles) // 2) or not roles:
      raise RecordError(f"record {record.id}: turns must alternate user, assistant; got {roles}")
    for turn in conversation.turns:
      _check_placeholders(turn.text, record)


def _check_picture(picture: Picture, where: str) -> None:
  if not picture.image:
    raise RecordError(f"{where}: it has no bytes; a record of text alone has no picture")
  objects, rows = len(picture.tags), len(picture.detection_features)
  shapes = {
      "boxes": (objects, 4), "scores": (objects,), "mask_features": (objects, FEATURE_WIDTH),
      "detection_features": (rows, FEATURE_WIDTH), "detection_boxes": (rows, 4),
      "text_boxes": (len(picture.text_boxes), 4),
      "mask_ious": (len(picture.mask_ious),), "mask_areas": (len(picture.mask_areas),)}
  for name, shape in shapes.items():
    value = getattr(picture, name)
    if value.shape != shape:
      raise RecordError(f"{where}: {name} has shape {value.shape}, expected {shape}")
    if not np.isfinite(value).all():
      raise RecordError(f"{where}: {name} holds a value that is not finite")


def _check_placeholders(text: str, record: Record) -> None:
  pictures = len(record.pictures)
  for number in IMAGE_PLACEHOLDER.findall(text):
    if int(number) >= pictures:
      raise RecordError(f"record {record.id}: <image {number}> but only {pictures} pictures")
  for number, box in BOX_PLACEHOLDER.findall(text):
    if int(number) >= pictures:
      raise RecordError(f"record {record.id}: <box {number}.{box}> but only {pictures} pictures")
    boxes = len(record.pictures[int(number)].text_boxes)
    if int(box) >= boxes:
      raise RecordError(f"record {record.id}: <box {number}.{box}> but only {boxes} text boxes in picture {number}")
  if without := _BOX_WITHOUT_PICTURE.search(text):
    raise RecordError(f"record {record.id}: {without[0]} names no picture: write <box 0.{without[1]}>")
