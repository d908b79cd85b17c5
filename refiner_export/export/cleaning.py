"""What a source gives, made fit for a record: a bad text or box is left out for a reason, and ends nothing.

This holds for every source. What is left out is counted by reason. Texts are escaped where no placeholder can be meant.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from refiner_export.records.record import (
    ASSISTANT, BOX_PLACEHOLDER, IMAGE_PLACEHOLDER, USER, Conversation, Turn, escape, is_text)
from refiner_export.sources.base import Corners, SourceExample, SourceObject, SourcePicture

_ROUNDING = 1e-6  # how far a box may stick out of the picture
_NO_BOX = (0.0, 0.0, 0.0, 0.0)  # stands for a bad box of texts, which no conversation mentions any more


def clean(example: SourceExample) -> SourceExample:
  """The example without what cannot be stored; `dropped` says what is missing. A bad id makes the example a fault."""
  if not is_text(example.id) or not example.id:
    return SourceExample(ascii(example.id), fault="its id is not a text")
  dropped = list(example.dropped)
  pictures = []
  for picture in example.pictures:
    pictures.append(_picture(picture, dropped))
  captions = []
  for caption in example.captions:
    reason = _text_fault(caption)
    if reason:
      dropped.append(f"caption: {reason}")
    else:
      captions.append(escape(caption))
  conversations = []
  for conversation in example.conversations:
    reason = _conversation_fault(conversation, pictures)
    if reason:
      dropped.append(f"conversation: {reason}")
    else:
      conversations.append(conversation)
  return dataclasses.replace(example, pictures=tuple(pictures), captions=tuple(captions),
                             conversations=tuple(conversations), dropped=tuple(dropped))


def _picture(picture: SourcePicture, dropped: list[str]) -> SourcePicture:
  objects, text_boxes, credit = [], [], picture.credit
  for thing in picture.objects:
    has_tag = is_text(thing.tag) and thing.tag.strip()
    reason = _box_fault(thing.box) or ("" if has_tag else "its tag is empty or no text")
    if reason:
      dropped.append(f"object: {reason}")
      continue
    objects.append(_with_mask_version(dataclasses.replace(thing, box=_clipped(thing.box)), dropped))
  for box in picture.text_boxes:
    text_boxes.append(_NO_BOX if _box_fault(box) else _clipped(box))
  if not is_text(credit):
    dropped.append("credit: not a text")
    credit = ""
  return dataclasses.replace(picture, objects=tuple(objects), text_boxes=tuple(text_boxes), credit=credit)


def _with_mask_version(thing: SourceObject, dropped: list[str]) -> SourceObject:
  """The object with a version of its mask; without the mask when the mask is none."""
  if thing.mask is None or thing.mask_version:
    return thing
  try:
    mask = np.asarray(thing.mask())
    if mask.ndim != 2 or mask.dtype != bool or not mask.any():
      raise ValueError("not a mask")
  except (ValueError, TypeError, OSError):
    dropped.append("mask cannot be used: its box stands for it")
    return dataclasses.replace(thing, mask=None)
  digest = hashlib.sha256(repr(mask.shape).encode() + np.packbits(mask).tobytes())
  return dataclasses.replace(thing, mask_version=digest.hexdigest()[:12])


def _text_fault(text: object) -> str:
  """Why a text cannot be stored; "" for a good one."""
  if not isinstance(text, str):
    return "not a text"
  if not is_text(text):
    return "not valid Unicode"
  return "" if text.strip() else "empty"


def _box_fault(box: object) -> str:
  """Why a box cannot be stored; "" for a good one."""
  try:
    left, top, right, bottom = map(float, box)
  except (TypeError, ValueError, OverflowError):
    return "its box is not four numbers"
  if not all(map(math.isfinite, (left, top, right, bottom))):
    return "a number of its box is not finite"
  if min(left, top, right, bottom) < -_ROUNDING or max(left, top, right, bottom) > 1 + _ROUNDING:
    return "its box lies outside of the picture"
  clipped = _clipped(box)
  return "" if clipped[0] < clipped[2] and clipped[1] < clipped[3] else "its box has no area"


def _clipped(box: Corners) -> Corners:
  return tuple([min(max(float(corner), 0.0), 1.0) for corner in box])


def _conversation_fault(conversation: Conversation, pictures: Sequence[SourcePicture]) -> str:
  """Why a conversation cannot be stored; "" for a good one."""
  roles = [turn.role for turn in conversation.turns]
  if not roles or roles != [USER, ASSISTANT] * (len(roles) // 2):
    return "its turns do not alternate between user and assistant"
  if not is_text(conversation.task) or not conversation.task:
    return "its task is not a text"
  for turn in conversation.turns:
    reason = _turn_fault(turn, pictures)
    if reason:
      return reason
  return ""


def _turn_fault(turn: Turn, pictures: Sequence[SourcePicture]) -> str:
  reason = _text_fault(turn.text)
  if reason == "empty":
    return "an answer is empty" if turn.role == ASSISTANT else ""
  if reason:
    return reason
  for number in IMAGE_PLACEHOLDER.findall(turn.text):
    if _position(number, pictures) is None:
      return "it points at a picture that is not there"
  rest = BOX_PLACEHOLDER.sub("", IMAGE_PLACEHOLDER.sub("", turn.text))
  if escape(rest) != rest:
    return "it has a placeholder that names no picture"
  for number, box in BOX_PLACEHOLDER.findall(turn.text):
    picture = _position(number, pictures)
    found = None if picture is None else _position(box, picture.text_boxes)
    if found is None or found == _NO_BOX:
      return "it points at a box that is not there"
  return ""


def _position(digits: str, sequence: Sequence):
  """The element of this number; None when there is none. The number may have any count of digits."""
  return sequence[int(digits)] if len(digits) < 10 and int(digits) < len(sequence) else None
