"""Conversations as token ids of the language model.

The pieces of a conversation are tokenised one by one: a question, an answer, and the parts of a text before and after a
picture. So an answer's tokens do not depend on what stands before it, and a prompt for generation has exactly the ids
that training saw.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lyrics_jax.data.spatial import referred_pictures, without_pictures
from lyrics_jax.data.templates import Template
from lyrics_jax.data.tokenizers import LLMTokenizer
from refiner_export.common.settings import require
from refiner_export.records.record import IMAGE_PLACEHOLDER, image_placeholder

NO_SLOT = -1  # slot of a token that is text


@dataclasses.dataclass(frozen=True)
class ConversationText:
  """Encodes conversations.

  Args:
    length: L, tokens of a row.
    tokens: soft tokens of a picture, 64 in the paper.
  """
  tokenizer: LLMTokenizer
  template: Template
  length: int
  tokens: int

  def encode(self, texts: Sequence[str], objects: Sequence[tuple[int, str]] = ()) -> dict[str, np.ndarray]:
    """The fields of one conversation.

    A conversation that is too long loses its last turns. A first answer that is too long loses its end.

    Args:
      texts: question, answer, question, answer, ...; an odd number is a prompt, which ends before an answer.
        `<image K>` says where the soft tokens of picture K stand, see `place_pictures`.
      objects: pairs of picture and spatial text, the most needed first. A text is put behind its picture in the first
        question; as many texts as fit in half of the room for text.

    Returns:
      ids: int32 (L,), padded at the end; the padding id also at the pictures' places.
      segments: int32 (L,), 1 at the conversation, 0 at the padding.
      targets: bool (L,), True at the answers' tokens and their end: the tokens whose prediction is trained.
      slot: int32 (L,), K * tokens ... K * tokens + tokens - 1 at the place of picture K, -1 elsewhere.

    Raises:
      UserError: the prompt is too long.
    """
    turns = []
    for index in range(0, len(texts), 2):
      turn = [self._first_question(texts[0], objects) if index == 0 else self._question(texts[index], first=False)]
      if index + 1 < len(texts):
        turn.append(self._answer(texts[index + 1]))
      turns.append(turn)
    if len(texts) % 2 == 0:
      turns = self._fit(turns)
    pieces = sum(turns, [])
    count = sum(map(len, pieces))
    require(count <= self.length,
            f"the prompt {without_pictures(texts[0])[:40]!r} takes {count} tokens, there is room for {self.length}: "
            "raise config.data.llm_length or shorten the prompt")
    return self._rows(pieces)

  def _first_question(self, text: str, objects: Sequence[tuple[int, str]]) -> "_Piece":
    """The first question with as many objects as there is room for."""
    plain = self._question(text, first=True)
    # The room must not depend on the answer: a prompt has none, and is to have the same objects.
    words = len(plain) - plain.pictured
    room = min((self.length - plain.pictured) // 2, self.length - plain.pictured - words - 1)
    placed, written, sizes = referred_pictures(text), [], []
    for picture, spatial in objects:
      if picture in placed:
        written.append((picture, spatial))
        sizes.append(len(self.tokenizer.encode(spatial)))
    most = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
    for count in range(most, 0, -1):
      with_objects = self._question(_insert_objects(text, written[:count]), first=True)
      if len(with_objects) - len(plain) <= room:
        return with_objects
    return plain

  def _question(self, text: str, first: bool) -> "_Piece":
    ids, slot = self._encode(self.template.question(text, first))
    if first:
      ids, slot = [self.tokenizer.bos, *ids], [NO_SLOT, *slot]
    return _Piece(ids, slot, np.zeros(len(ids), bool))

  def _answer(self, text: str) -> "_Piece":
    ids, slot = self._encode(self.template.answer(text))
    end = self.template.end(self.tokenizer)
    slot += [NO_SLOT] * len(end)
    return _Piece(ids + end, slot, np.array(slot, np.int32) == NO_SLOT)

  def _encode(self, text: str) -> tuple[list[int], list[int]]:
    """Ids and slots of a text with `<image K>` in it."""
    ids, slot = [], []
    parts = IMAGE_PLACEHOLDER.split(text)  # words, K, words, K, ..., words
    for index, part in enumerate(parts):
      if index % 2:
        ids += [self.tokenizer.pad] * self.tokens
        slot += range(int(part) * self.tokens, (int(part) + 1) * self.tokens)
      elif part or len(parts) == 1:
        words = self.tokenizer.encode(part)
        ids += words
        slot += [NO_SLOT] * len(words)
    return ids, slot

  def _fit(self, turns: list[list["_Piece"]]) -> list[list["_Piece"]]:
    """The first turns that fit whole. A first turn that does not fit keeps at least one token of its answer."""
    ends = np.cumsum([sum(map(len, turn)) for turn in turns])
    whole = int(np.searchsorted(ends, self.length, side="right"))
    if whole:
      return turns[:whole]
    question, answer = turns[0]
    return [[question, answer.cut(max(self.length - len(question), 1))]]

  def _rows(self, pieces: Sequence["_Piece"]) -> dict[str, np.ndarray]:
    """The pieces one behind the other, padded."""
    ids = np.full(self.length, self.tokenizer.pad, np.int32)
    segments = np.zeros(self.length, np.int32)
    targets = np.zeros(self.length, bool)
    slot = np.full(self.length, NO_SLOT, np.int32)
    start = 0
    for piece in pieces:
      part = slice(start, start + len(piece))
      ids[part], segments[part], targets[part], slot[part] = piece.ids, 1, piece.targets, piece.slot
      start = part.stop
    return {"ids": ids, "segments": segments, "targets": targets, "slot": slot}


def place_pictures(texts: Sequence[str], count: int) -> list[str]:
  """The texts with a place for each of `count` pictures.

  Texts that hold an `<image K>` stay as they are. Otherwise all pictures stand before the first question, in their
  order, and a newline follows them.
  """
  if not count or any(map(IMAGE_PLACEHOLDER.search, texts)):
    return list(texts)
  pictures = "".join(map(image_placeholder, range(count)))
  return [f"{pictures}\n{texts[0]}", *texts[1:]]


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Tokens of a question or an answer: three sequences of one length, see `ConversationText.encode`."""
  ids: Sequence[int]
  slot: Sequence[int]
  targets: np.ndarray

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def pictured(self) -> int:
    """How many of the tokens stand for pictures."""
    return int(np.count_nonzero(np.asarray(self.slot) != NO_SLOT))

  def cut(self, length: int) -> "_Piece":
    return _Piece(self.ids[:length], self.slot[:length], self.targets[:length])


def _insert_objects(text: str, objects: Sequence[tuple[int, str]]) -> str:
  """The text with the objects of each picture on a line of their own, behind the first place of the picture."""
  for picture in dict.fromkeys(referred_pictures(text)):
    lines = "".join(written for owner, written in objects if owner == picture)
    placeholder = image_placeholder(picture)
    before, after = text.split(placeholder, 1)
    if lines:
      ending = "" if after.startswith("\n") else "\n"
      text = f"{before}{placeholder}\n{lines}{ending}{after}"
  return text
