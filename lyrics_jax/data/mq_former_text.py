"""Token ids of the MQ-Former's two texts: the spatial representation, and the caption or instruction."""

from collections.abc import Sequence

import numpy as np

from lyrics_jax.data.padding import pad_ids
from lyrics_jax.data.spatial import format_box
from lyrics_jax.data.tokenizers import MQFormerTokenizer

OUTSIDE = -1  # owner of a token that belongs to no object's tag or box


def encode_objects(tokenizer: MQFormerTokenizer, objects: Sequence[tuple[str, np.ndarray]], coordinates: str,
                   length: int) -> tuple[list[int], list[int]]:
  """`[BOS]` and as many whole objects as fit in `length`, in the given order.

  Returns:
    The ids, and for each id the index of the object whose tag or box it spells. `[BOS]` and the markers have `OUTSIDE`.
  """
  open_object, close_object, open_tag, close_tag, open_box, close_box = tokenizer.spatial
  ids, owners = [tokenizer.bos], [OUTSIDE]
  for index, (tag, box) in enumerate(objects):
    tag_ids, box_ids = tokenizer.encode(tag), tokenizer.encode(format_box(box, coordinates))
    object_ids = [open_object, open_tag, *tag_ids, close_tag, open_box, *box_ids, close_box, close_object]
    if len(ids) + len(object_ids) > length:
      break
    ids += object_ids
    owners += [OUTSIDE, OUTSIDE, *[index] * len(tag_ids), OUTSIDE, OUTSIDE, *[index] * len(box_ids), OUTSIDE, OUTSIDE]
  return ids, owners


def encode_sentence(tokenizer: MQFormerTokenizer, text: str, length: int) -> list[int]:
  """`[CLS]` text `[SEP]`, the text cut to fit in `length`."""
  return [tokenizer.cls, *tokenizer.encode(text)[:length - 2], tokenizer.sep]


def padded_sentence(tokenizer: MQFormerTokenizer, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
  """`encode_sentence` as int32 (length,), and bool (length,), True at the tokens."""
  return pad_ids(encode_sentence(tokenizer, text, length), length, tokenizer.pad)
