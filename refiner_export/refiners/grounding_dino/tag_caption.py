"""Tags as the captions that Grounding-DINO reads, with the place of each tag's tokens in them.

A caption is `[CLS] tag . tag . tag . [SEP]` in BERT's word pieces. The full stops also part the tags from each other in
the model's text attention, so a full stop or a question mark inside a tag is taken for a space.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import torch
from transformers import BertTokenizer

from refiner_export.common.settings import UserError, require

VOCABULARY_REMEDY = "Name a directory with tokenizer.json or vocab.txt of bert-base-uncased"
_KNOWN_TOKENS = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}  # transformers' model has these numbers built in
_NO_TAG = "object"  # what is looked for in a picture without tags, which needs its rows all the same
_DIVIDERS = re.compile(r"[.?]")


@dataclasses.dataclass(frozen=True)
class Caption:
  """Some tags of a picture, as many as one pass of the model takes.

  Attributes:
    ids: token ids from [CLS] to [SEP].
    tags: names as they were given, in their order; empty when the caption is only there for the rows.
    spans: one (first, end) per tag: its tokens are `ids[first:end]`, without the full stop.
  """
  ids: tuple[int, ...]
  tags: tuple[str, ...] = ()
  spans: tuple[tuple[int, int], ...] = ()


def load_tokenizer(file: pathlib.Path, size: int) -> BertTokenizer:
  """The tokenizer of the directory in which this file is the vocabulary.

  Args:
    file: tokenizer.json or vocab.txt.
    size: how many tokens the model knows.

  Raises:
    UserError: there is none, or not one that the model was trained with.
  """
  try:
    tokenizer = BertTokenizer.from_pretrained(file.parent, local_files_only=True)
  except Exception as error:  # the tokenizers library raises plain exceptions
    raise UserError(f"{file}: not a tokenizer: {' '.join(str(error).split())[:200]}. {VOCABULARY_REMEDY}") from None
  for token, number in _KNOWN_TOKENS.items():
    found = tokenizer.convert_tokens_to_ids(token)
    require(found == number, f"{file}: {token} is token {found}, the model knows it as {number}. {VOCABULARY_REMEDY}")
  require(len(tokenizer) <= size, f"{file}: {len(tokenizer)} tokens, the model knows {size}. {VOCABULARY_REMEDY}")
  return tokenizer


class Captioner:
  """Builds captions of at most `budget` tokens, [CLS] and [SEP] included."""

  def __init__(self, tokenizer: BertTokenizer, budget: int):
    self._tokenizer, self._budget = tokenizer, budget
    self._stop = tokenizer.convert_tokens_to_ids(".")

  def captions(self, tags: Sequence[str]) -> list[Caption]:
    """The captions of one picture, at least one.

    Tags are taken in their order until the budget is spent, then the next caption begins: the first caption holds the
    best tags when the best come first. A tag that is longer than a whole caption is cut to what fits; one of which no
    token is left, such as "?", is passed over. Without any tag there is one caption that says "object" and has no tags.
    """
    cuts = [(tag, tokens[:self._budget - 3]) for tag, tokens in zip(tags, self._tokens(tags)) if tokens]
    if not cuts:
      return [self._caption([], self._tokens([_NO_TAG]))]
    chunks, room = [[]], self._budget - 2
    for tag, tokens in cuts:
      if len(tokens) + 1 > room:
        chunks.append([])
        room = self._budget - 2
      chunks[-1].append((tag, tokens))
      room -= len(tokens) + 1
    return [self._caption(*zip(*chunk)) for chunk in chunks]

  def pad(self, captions: Sequence[Caption]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of captions, padded on the right to the longest.

    Returns:
      ids: int64 (B, T).
      mask: int64 (B, T), 1 for a token and 0 for padding.
      owners: int64 (B, T), 0 for a token of no tag, else 1 + which of its caption's tags it belongs to.
    """
    length = max(len(caption.ids) for caption in captions)
    ids = torch.full((len(captions), length), self._tokenizer.pad_token_id)
    mask, owners = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, caption in enumerate(captions):
      ids[row, :len(caption.ids)] = torch.tensor(caption.ids)
      mask[row, :len(caption.ids)] = 1
      for tag, (first, end) in enumerate(caption.spans, start=1):
        owners[row, first:end] = tag
    return ids, mask, owners

  def _tokens(self, tags: Sequence[str]) -> list[list[int]]:
    if not tags:
      return []
    words = [_DIVIDERS.sub(" ", tag.lower()) for tag in tags]
    # BERT splits at spaces and punctuation first, so a tag's tokens are the same alone and inside the caption.
    return self._tokenizer(words, add_special_tokens=False)["input_ids"]

  def _caption(self, tags: Sequence[str], tokens: Sequence[Sequence[int]]) -> Caption:
    ids, spans = [self._tokenizer.cls_token_id], []
    for of_tag in tokens:
      spans.append((len(ids), len(ids) + len(of_tag)))
      ids += [*of_tag, self._stop]
    return Caption((*ids, self._tokenizer.sep_token_id), tuple(tags), tuple(spans[:len(tags)]))
