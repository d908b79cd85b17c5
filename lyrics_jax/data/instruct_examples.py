"""Examples of stage 2: one conversation about one record (paper section 3.4), and prompts for generation."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from lyrics_jax.config import Config
from lyrics_jax.data.conversation import encode_conversation
from lyrics_jax.data.errors import about
from lyrics_jax.data.images import View, mentions_side, sample_view
from lyrics_jax.data.instructions import instruction
from lyrics_jax.data.mq_former_text import encode_objects, encode_sentence
from lyrics_jax.data.padding import pad_ids
from lyrics_jax.data.spatial import fill_boxes, format_object, referred_boxes
from lyrics_jax.data.tokenizers import LLMTokenizer, MQFormerTokenizer
from lyrics_jax.data.visual import objects_in_view, visual_inputs
from refiner_export.records.record import USER, Conversation, Record

_VIEW_TRIES = 10  # to find a view that keeps every box a conversation refers to


@dataclasses.dataclass(frozen=True)
class InstructExamples:
  """Makes the examples of stage 2."""
  config: Config
  mq_former_tokenizer: MQFormerTokenizer
  llm_tokenizer: LLMTokenizer

  def __call__(self, item: tuple[Record, int], rng: np.random.Generator,
               augment: bool = True) -> dict[str, np.ndarray | str]:
    """The example of conversation `item[1]` of record `item[0]`.

    Args:
      item: record and index of the conversation.
      rng: draws the view and the instruction templates.
      augment: false takes the whole picture and the first template of the family.

    Returns:
      What `prompt` returns, the answers being part of the conversation and `llm_targets` True at their tokens.
    """
    record, index = item
    with about(record):
      conversation = record.conversations[index]
      view = self._sample_view(record, conversation, rng) if augment else View()
      texts = [instruction(conversation.task, turn.text, rng if augment else None) if turn.role == USER else turn.text
               for turn in conversation.turns]
      return self._example(record, texts, view)

  def prompt(self, record: Record, texts: Sequence[str]) -> dict[str, np.ndarray | str]:
    """The inputs of generation: the whole picture and a free text, which no template changes.

    Args:
      record: its conversations are not looked at.
      texts: question, or question, answer, ..., question; may hold `<box K>` placeholders of the record's text boxes.

    Returns, with Ls, Lc = spatial and caption length, L = config.data.llm_length:
      id: the record's.
      image, detection, detection_mask, masks, masks_mask: see `visual.visual_inputs`.
      spatial_ids: int32 (Ls,), `[BOS]` and the spatial representation (`[BOS]` alone unless
        config.instruct.spatial_to_mq_former); spatial_mask: bool (Ls,).
      instruction_ids: int32 (Lc,), `[CLS]` first question `[SEP]` (no question unless
        config.instruct.instruction_aware); instruction_mask: bool (Lc,).
      llm_ids, llm_mask, llm_targets, image_slot: (L,), see `conversation.encode_conversation`.
    """
    with about(record):
      return self._example(record, list(texts), View())

  def _example(self, record: Record, texts: Sequence[str], view: View) -> dict[str, np.ndarray | str]:
    data, model, instruct = self.config.data, self.config.model, self.config.instruct
    boxes, _ = view.boxes_xyxy(record.text_boxes)
    texts = [fill_boxes(text, boxes, data.coordinates) for text in texts]
    objects = objects_in_view(record, view, model)
    to_mq_former, _ = encode_objects(self.mq_former_tokenizer, objects if instruct.spatial_to_mq_former else [],
                                     data.coordinates, data.spatial_length)
    to_llm = [format_object(tag, box, data.coordinates) for tag, box in _asked_first(objects, texts[0])
              if instruct.spatial_to_llm]
    spatial_ids, spatial_mask = pad_ids(to_mq_former, data.spatial_length, self.mq_former_tokenizer.pad)
    heard = texts[0] if instruct.instruction_aware else ""
    heard_ids = encode_sentence(self.mq_former_tokenizer, heard, data.caption_length)
    instruction_ids, instruction_mask = pad_ids(heard_ids, data.caption_length, self.mq_former_tokenizer.pad)
    queries = model.mq_former.visual_queries + model.mq_former.grounding_queries
    return {"id": record.id, **visual_inputs(record, view, model),
            "spatial_ids": spatial_ids, "spatial_mask": spatial_mask,
            "instruction_ids": instruction_ids, "instruction_mask": instruction_mask,
            **encode_conversation(self.llm_tokenizer, instruct.system_message, texts, data.llm_length,
                                  image_tokens=queries if record.image else 0, objects=to_llm)}

  def _sample_view(self, record: Record, conversation: Conversation, rng: np.random.Generator) -> View:
    """A view that keeps every box the conversation refers to; the whole picture when none is found."""
    data = self.config.data
    said = [turn.text for turn in conversation.turns]
    # A mirrored picture belies "left" and "right", and its writing cannot be read.
    flip = data.flip and conversation.task != "text_vqa" and not any(mentions_side(text) for text in said)
    referred = record.text_boxes[[index for text in said for index in referred_boxes(text)]]
    for _ in range(_VIEW_TRIES):
      view = sample_view(rng, data.crop_scale, flip)
      if view.boxes_xyxy(referred)[1].all():
        return view
    return View()


def _asked_first(objects: Sequence[tuple[str, np.ndarray]], question: str) -> list[tuple[str, np.ndarray]]:
  """The objects that a question names, then the others, each in their order: what is asked about must find room."""
  return sorted(objects, key=lambda thing: re.search(rf"\b{re.escape(thing[0])}\b", question.lower()) is None)
