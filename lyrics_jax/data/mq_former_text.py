"""Token ids of the MQ-Former's two texts: the spatial representation and the caption or instruction."""

from collections.abc import Sequence

import numpy as np

from lyrics_jax.data.spatial import format_box
from lyrics_jax.data.tokenizers import MQFormerTokenizer

OUTSIDE = -1  # owner of a token that belongs to no object's tag or box


def encode_objects(tokenizer: MQFormerTokenizer, objects: Sequence[tuple[str, np.ndarray]], coordinates: str,
                   length: int) -> tuple[list[int], list[int]]:
  """`[BOS]` and as many whole objects as fit in `length`, in the given order.

  Returns:
    ids, and for each the index of the object whose tag or box it spells; `OUTSIDE` for `[BOS]` and the markers.
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


def mask_objects(owners: Sequence[int], probability: float, rng: np.random.Generator) -> np.ndarray:
  """bool (n,), True at the tokens to predict: the whole tag and box of each object drawn with `probability`.

  At least one object is drawn when there is any, so that every example teaches something. The markers stay visible:
  they tell the layout.
  """
  owners = np.asarray(owners)
  count = owners.max() + 1
  drawn = rng.random(count) < probability
  if count and not drawn.any():
    drawn[rng.integers(count)] = True
  return np.isin(owners, np.flatnonzero(drawn))


def encode_sentence(tokenizer: MQFormerTokenizer, text: str, length: int) -> list[int]:
  """`[CLS]` text `[SEP]`, the text cut to fit in `length`."""
  return [tokenizer.cls, *tokenizer.encode(text)[:length - 2], tokenizer.sep]
