"""Rows of stage 2: conversations about any number of pictures (paper section 3.3), and prompts for generation."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lyrics_jax.data.batch import Batch, Dimensions, Fields
from lyrics_jax.data.conversation_text import ConversationText, place_pictures
from lyrics_jax.data.errors import about
from lyrics_jax.data.mq_former_text import encode_objects, padded_sentence
from lyrics_jax.data.padding import pad_ids
from lyrics_jax.data.pictures import VISUAL, PictureInputs
from lyrics_jax.data.rows import Example, Objective, Records, Rows
from lyrics_jax.data.spatial import (
    fill_boxes, format_object, referred_boxes, referred_pictures, renumber_pictures, without_pictures)
from lyrics_jax.data.templates import Template, VicunaV1
from lyrics_jax.data.tokenizers import Tokenizers, load_tokenizers
from lyrics_jax.data.views import View
from lyrics_jax.tasks import Task, default_tasks, find_task
from refiner_export.common.settings import require
from refiner_export.records.record import USER, Conversation, Picture, Record, conversation_items

if TYPE_CHECKING:
  from lyrics_jax.data.settings import DataSettings

_LEADING_PICTURES = re.compile(r"(\s*<image \d+>\s*)*")


@dataclasses.dataclass(unsafe_hash=True)
class Conversations(Rows):
  """One conversation a row. A record's captions are conversations, too, of task "caption"."""
  makes: ClassVar[tuple[str, ...]] = (*VISUAL, "spatial_ids", "spatial_mask", "instruction_ids", "instruction_mask",
                                      "ids", "segments", "targets", "slot")
  item: ClassVar[str] = "conversation"
  template: Template = field(default_factory=VicunaV1)
  # Whether the spatial representation also stands in the text of the language model, as many objects as there is room
  # for. The objects that the question names come first.
  spatial_to_llm: bool = False
  tasks: tuple[Task, ...] = field(default_factory=default_tasks)  # the instruction families that records may name

  def check(self, path):
    names = set()
    for task in self.tasks:
      require(task.name not in names, f"{path}.tasks: two tasks are named {task.name!r}: keep one")
      names.add(task.name)

  def items(self, records: Records) -> "ConversationSource":
    return ConversationSource(records)

  def check_fields(self, fields: Fields, objectives: Sequence[Objective] = ()) -> None:
    """As in `Rows`; objectives cannot add fields to conversations, because `prepare` takes a pair."""
    super().check_fields(fields)

  def examples(self, data: "DataSettings", fields: Fields, dimensions: Dimensions,
               objectives: Sequence[Objective] = ()) -> "ConversationExamples":
    self.check_fields(fields)
    return ConversationExamples(self, data, fields, dimensions, load_tokenizers(data, fields, dimensions))


class ConversationSource:
  """Random access to (record, number of conversation), over all conversations of all records."""

  def __init__(self, records: Records):
    self._records = records
    self._ends = np.cumsum(records.read_conversation_counts(), dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, position: int) -> tuple[Record, int]:
    record = int(np.searchsorted(self._ends, position, side="right"))
    start = int(self._ends[record - 1]) if record else 0
    return self._records[record], int(position) - start


@dataclasses.dataclass(frozen=True)
class _Shown:
  """A picture of a conversation: its number in the record, itself, and how it is seen."""
  number: int
  picture: Picture
  view: View


@dataclasses.dataclass(frozen=True)
class ConversationExamples:
  """Makes the examples of `Conversations`."""
  rows: Conversations
  data: "DataSettings"
  fields: Fields
  dimensions: Dimensions
  tokenizers: Tokenizers

  @property
  def pictures(self) -> PictureInputs:
    return PictureInputs(self.data, self.fields, self.dimensions)

  def __call__(self, item: tuple[Record, int], rng: np.random.Generator, augment: bool = True) -> Example:
    """The example of conversation `item[1]` of record `item[0]`, see `conversation_items`.

    Args:
      item: record and number of the conversation.
      rng: draws the views and the templates of the task.
      augment: false takes whole pictures and the first template of the task.

    Returns:
      What `prompt` returns. The answers are part of the conversation, and `targets` is True at their tokens.
    """
    record, index = item
    with about(record):
      conversation = conversation_items(record)[index]
      task = find_task(self.rows.tasks, conversation.task)
      bare = [turn.text for turn in conversation.turns]
      shown = self._look(record, bare, task, rng if augment else None)
      return self._example(record, _said(conversation, task, rng if augment else None), shown)

  def prompt(self, record: Record, texts: Sequence[str]) -> Example:
    """The inputs of generation: whole pictures and free texts, which no template of a task changes.

    Args:
      record: gives the pictures; its own conversations are not looked at.
      texts: question, or question, answer, ..., question. They may hold `<image K>` and `<box I.K>`.

    Returns, of the fields that the stage reads, with I = data.pictures, Ls, Lc, L = spatial, caption and llm length:
      record: the record's id.
      image and the other visual fields: (I, ...), see `PictureInputs.arrays`; blank for a picture that is not there.
      spatial_ids: int32 (I, Ls), `[BOS]` and the spatial representation of the picture; spatial_mask: bool (I, Ls).
      instruction_ids: int32 (I, Lc), `[CLS]` question `[SEP]`, the question in which the picture stands;
        instruction_mask: bool (I, Lc).
      ids, segments, targets, slot: (L,), see `ConversationText.encode`.
    """
    with about(record):
      return self._example(record, list(texts), self._look(record, texts, None, None))

  def _look(self, record: Record, texts: Sequence[str], task: Task | None,
            rng: np.random.Generator | None) -> list[_Shown]:
    """The pictures of a conversation and how they are seen.

    A sampled view keeps every box that the texts refer to. Without `rng` the whole picture is seen.
    """
    boxes = []
    for text in texts:
      boxes += referred_boxes(text)
    shown = []
    for number in _pictures_of(record, texts, self.data.pictures):
      picture = record.pictures[number]
      view = self.pictures.whole(picture)
      if rng is not None:
        kept = [box for owner, box in boxes if owner == number]
        view = self.pictures.sample(picture, rng, task.may_crop(texts), task.may_flip(texts), kept)
      shown.append(_Shown(number, picture, view))
    return shown

  def _example(self, record: Record, texts: list[str], shown: list[_Shown]) -> Example:
    boxes, numbers = [np.zeros((0, 4), np.float32)] * len(record.pictures), []
    for one in shown:
      boxes[one.number], _ = one.view.boxes_xyxy(one.picture.text_boxes)
      numbers.append(one.number)
    written = []
    for text in texts:
      written.append(renumber_pictures(fill_boxes(text, boxes, self.data.coordinates), numbers))
    texts = place_pictures(written, len(shown))
    pictures = []
    for index, one in enumerate(shown):
      pictures.append(self._of_picture(index, one, texts))
    arrays = self.pictures.stack(pictures)
    encoder = ConversationText(self.tokenizers.llm, self.rows.template, self.data.llm_length, self.dimensions.tokens)
    arrays |= encoder.encode(texts, self._objects_for_llm(shown, texts[0]) if self.rows.spatial_to_llm else ())
    return {"record": record.id} | {name: arrays[name] for name in self.fields}

  def _of_picture(self, index: int, one: _Shown, texts: Sequence[str]) -> Batch:
    """The fields of the conversation's picture `index`: what is seen, and the texts that the MQ-Former reads."""
    data, tokenizer = self.data, self.tokenizers.former
    arrays = self.pictures.arrays(one.picture, one.view)
    if "spatial_ids" in self.fields:
      objects = self.pictures.objects(one.picture, one.view)
      ids, _ = encode_objects(tokenizer, objects, data.coordinates, data.spatial_length)
      arrays["spatial_ids"], arrays["spatial_mask"] = pad_ids(ids, data.spatial_length, tokenizer.pad)
    if "instruction_ids" in self.fields:
      question = texts[0]
      for text in texts[::2]:
        if index in referred_pictures(text):
          question = text
          break
      arrays["instruction_ids"], arrays["instruction_mask"] = padded_sentence(
          tokenizer, without_pictures(question), data.caption_length)
    return arrays

  def _objects_for_llm(self, shown: Sequence[_Shown], question: str) -> list[tuple[int, str]]:
    """Picture and spatial text of each object.

    Objects that the question names come first, because what is asked about must find room. Among them, and among the
    others, the best object of each picture comes first, then the second of each, and so on.
    """
    question, ranked = question.lower(), []
    for index, one in enumerate(shown):
      for rank, (tag, box) in enumerate(self.pictures.objects(one.picture, one.view)):
        is_named = re.search(rf"\b{re.escape(tag)}\b", question) is not None
        ranked.append((not is_named, rank, index, format_object(tag, box, self.data.coordinates)))
    return [(index, written) for _, _, index, written in sorted(ranked)]


def _pictures_of(record: Record, texts: Sequence[str], most: int) -> list[int]:
  """Numbers of the pictures that the texts name, or of all when the texts name none.

  Raises `UserError` for more than `most` pictures, and for a placeholder that refers to nothing.
  """
  named, boxes = set(), []
  for text in texts:
    named.update(referred_pictures(text))
    boxes += referred_boxes(text)
  count = len(record.pictures)
  for number in named:
    require(number < count, f"a text refers to <image {number}>, but there are {count} pictures: number them from 0")
  numbers = sorted(named) or list(range(count))
  require(len(numbers) <= most, f"a conversation has {len(numbers)} pictures, config.data.pictures={most}: raise it, "
                                "or leave such records out")
  for number, box in boxes:
    placeholder = f"<box {number}.{box}>"
    require(number in numbers, f"a text refers to {placeholder}, but picture {number} stands nowhere in the "
                               f"conversation: put <image {number}> into a text")
    found = len(record.pictures[number].text_boxes)
    require(box < found, f"a text refers to {placeholder}, but there are {found} boxes in picture {number}: number "
                         "boxes from 0 and give one for each placeholder")
  return numbers


def _said(conversation: Conversation, task: Task, rng: np.random.Generator | None) -> list[str]:
  """The texts of a conversation, the questions in a template of the task.

  Pictures that stand in front of a bare question stay in front of the template's words.
  """
  texts = []
  for turn in conversation.turns:
    text = turn.text
    if turn.role == USER:
      pictures = _LEADING_PICTURES.match(text)[0]
      bare = text[len(pictures):]
      if pictures and not bare:
        pictures = f"{pictures.rstrip()}\n"
      text = pictures + task.instruction(bare, rng)
    texts.append(text)
  return texts
