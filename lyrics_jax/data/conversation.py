"""Conversations as token ids, after the template of Vicuna v1.1:

  {system} USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>

The pieces of the template are tokenised one by one, so that an answer's tokens do not depend on what stands before it
and a prompt for generation has exactly the ids that training saw.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from lyrics_jax.data.padding import pad_ids
from lyrics_jax.data.tokenizers import LLMTokenizer
from refiner_export.common.settings import require

NO_SLOT = -1  # image_slot of a token that is text


def encode_conversation(tokenizer: LLMTokenizer, system: str, texts: Sequence[str], length: int, image_tokens: int,
                        objects: Sequence[str] = ()) -> dict[str, np.ndarray]:
  """Ids of a conversation about one picture; L = `length`.

  A conversation that is too long loses its last turns; a first answer that is too long loses its end. A prompt that is
  too long is a `UserError`.

  Args:
    system: the system message.
    texts: question, answer, question, answer, ...; an odd number is a prompt, which ends with `ASSISTANT:`.
    image_tokens: soft tokens of the picture, 64 in the paper; 0 for a conversation without a picture.
    objects: spatial texts, the most needed first, put before the first question: as many as fit in half of the room
      for text.

  Returns:
    llm_ids: int32 (L,), padded at the end; the padding id also at the picture's places.
    llm_mask: bool (L,), False at the padding.
    llm_targets: bool (L,), True at the answers' tokens and their `</s>`: the tokens whose prediction is trained.
    image_slot: int32 (L,), 0 ... image_tokens - 1 at the picture's places, -1 elsewhere.
  """
  before, after = _first_question(tokenizer, system, texts[0], length, image_tokens, objects)
  asked = [before + [tokenizer.pad] * image_tokens + after, *(tokenizer.encode(_ask(text)) for text in texts[2::2])]
  answered = [tokenizer.encode(text) + [tokenizer.eos] for text in texts[1::2]]
  turns = list(itertools.zip_longest(asked, answered, fillvalue=[]))
  if len(asked) == len(answered):
    turns = _fit(turns, length)
  ids = [token for question, answer in turns for token in question + answer]
  targets = [trained for question, answer in turns for trained in [False] * len(question) + [True] * len(answer)]
  require(len(ids) <= length, f"the prompt {texts[0][:40]!r} takes {len(ids)} tokens, there is room for {length}: "
                              "raise config.data.llm_length or shorten the prompt")
  llm_ids, llm_mask = pad_ids(ids, length, tokenizer.pad)
  image_slot = np.full(length, NO_SLOT, np.int32)
  image_slot[len(before):len(before) + image_tokens] = np.arange(image_tokens)
  return {"llm_ids": llm_ids, "llm_mask": llm_mask, "image_slot": image_slot,
          "llm_targets": pad_ids(targets, length, False)[0].astype(bool)}


def _fit(turns: list[tuple[list[int], list[int]]], length: int) -> list[tuple[list[int], list[int]]]:
  """The first turns that fit whole; the first one always, its answer cut, but not to nothing."""
  ends = np.cumsum([len(question) + len(answer) for question, answer in turns])
  whole = int(np.searchsorted(ends, length, side="right"))
  question, answer = turns[0]
  return turns[:whole] or [(question, answer[:max(length - len(question), 1)])]


def _first_question(tokenizer: LLMTokenizer, system: str, question: str, length: int, image_tokens: int,
                    objects: Sequence[str]) -> tuple[list[int], list[int]]:
  """Ids before and after the picture, which stands between the system message and the first question."""
  if not image_tokens:
    return [tokenizer.bos, *tokenizer.encode(f"{system} {_ask(question)}")], []
  before = [tokenizer.bos, *tokenizer.encode(f"{system} USER: ")]
  encode = lambda spatial: tokenizer.encode(f"\n{spatial}{question} ASSISTANT:")
  after = encode("")
  # The room must not depend on the answer: a prompt has none, and is to have the same objects.
  room = min((length - image_tokens) // 2, length - image_tokens - len(before) - len(after) - 1)
  count = int(np.searchsorted(np.cumsum([len(tokenizer.encode(text)) for text in objects]), room, side="right"))
  while count:
    with_objects = encode("".join(objects[:count]) + "\n")
    if len(with_objects) - len(after) <= room:
      return before, with_objects
    count -= 1
  return before, after


def _ask(question: str) -> str:
  return f"USER: {question} ASSISTANT:"
