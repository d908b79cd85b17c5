"""Turns tags into the captions that Grounding-DINO reads, and keeps where the tokens of each tag are.

A caption is `[CLS] tag . tag . tag . [SEP]` in BERT's word pieces. The text attention of the model separates tags at
full stops. Therefore a full stop or a question mark inside a tag is replaced by a space.
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
_NO_TAG = "object"  # the caption of a picture without tags, which needs feature rows too
_DIVIDERS = re.compile(r"[.?]")


@dataclasses.dataclass(frozen=True)
class Caption:
  """Tags of a picture, at most as many as one pass of the model takes.

  Attributes:
    ids: token ids from [CLS] to [SEP].
    tags: the names that were given, in the same order; empty when the caption is only needed for the feature rows.
    spans: one (first, end) per tag. The tokens of the tag are `ids[first:end]`, without the full stop.
  """
  ids: tuple[int, ...]
  tags: tuple[str, ...] = ()
  spans: tuple[tuple[int, int], ...] = ()


def load_tokenizer(file: pathlib.Path, size: int) -> BertTokenizer:
  """The tokenizer of the directory that holds this file.

  Args:
    file: the vocabulary, tokenizer.json or vocab.txt.
    size: number of tokens that the model knows.

  Raises:
    UserError: there is no tokenizer, or the model was trained with another one.
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
  """Builds captions of at most `budget` tokens, including [CLS] and [SEP]."""

  def __init__(self, tokenizer: BertTokenizer, budget: int):
    self._tokenizer, self._budget = tokenizer, budget
    self._stop = tokenizer.convert_tokens_to_ids(".")

  def captions(self, tags: Sequence[str]) -> list[Caption]:
    """The captions of one picture, at least one.

    A caption takes the next tags until its budget is spent, then the next caption begins. So the first caption has the
    best tags when the best tags come first. A tag that is longer than a whole caption is cut to fit. A tag without
    tokens, such as "?", is left out. Without any tag there is one caption that says "object" and has no tags.
    """
    captions, names, spelt = [], [], []
    room = self._budget - 2  # without [CLS] and [SEP]
    for tag, tokens in zip(tags, self._tokens(tags)):
      if not tokens:
        continue
      tokens = tokens[:self._budget - 3]
      if len(tokens) + 1 > room:  # the tag and its full stop
        captions.append(self._caption(names, spelt))
        names, spelt, room = [], [], self._budget - 2
      names.append(tag)
      spelt.append(tokens)
      room -= len(tokens) + 1
    if not names:
      return [self._caption([], self._tokens([_NO_TAG]))]
    return [*captions, self._caption(names, spelt)]

  def pad(self, captions: Sequence[Caption]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of captions, padded on the right to the length of the longest caption.

    Returns:
      ids: int64 (B, T).
      mask: int64 (B, T), 1 for a token and 0 for padding.
      owners: int64 (B, T), 0 for a token of no tag, otherwise 1 + the number of the tag in its caption.
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
    """The token ids of each tag."""
    if not tags:
      return []
    words = [_DIVIDERS.sub(" ", tag.lower()) for tag in tags]
    # BERT splits at spaces and punctuation first, so a tag has the same tokens alone and inside a caption.
    return self._tokenizer(words, add_special_tokens=False)["input_ids"]

  def _caption(self, tags: Sequence[str], tokens: Sequence[Sequence[int]]) -> Caption:
    """A caption of these tokens, one sequence per phrase. `tags` is empty when the phrase is no tag."""
    ids, spans = [self._tokenizer.cls_token_id], []
    for phrase in tokens:
      spans.append((len(ids), len(ids) + len(phrase)))
      ids += [*phrase, self._stop]
    return Caption((*ids, self._tokenizer.sep_token_id), tuple(tags), tuple(spans[:len(tags)]))
