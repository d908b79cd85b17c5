"""Text lengths in buckets: the texts of a batch are cut to the shortest buckets that hold them.

Buckets are shares of the full lengths. The table of fields says which texts share a bucket: captions have a bucket of
their own, all other texts share one. So a step compiles at most `most_shapes` times. Examples of one window of several
batches are sorted by length before they are batched; otherwise nearly every large batch would hold one long text.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lyrics_jax.data.batch import Batch, Fields, text_masks

WINDOW = 8  # most batches that are sorted together
_LEAST_WINDOW = 4  # batches; a shorter window is taken only where an epoch has fewer

Lengths = dict[str, int]  # tokens of each text field, by its name


def lengths_of(fields: Fields, shares: Sequence[float], batch: Mapping[str, np.ndarray]) -> Lengths:
  """The lengths to which the texts of a batch can be cut without losing a token.

  With several hosts, take the maximum length over hosts for each field.

  Args:
    shares: ascending, the last is 1.
    batch: every text at its full length; also an example, which has no rows axis.
  """
  needed = {}  # the share of each bucket
  for name in text_masks(fields):
    bucket = fields[name].bucket
    needed[bucket] = max(needed.get(bucket, 0), _share(shares, batch[name]))
  lengths = {}
  for name, field in fields.items():
    if field.bucket is not None:
      lengths[name] = math.ceil(needed.get(field.bucket, 1) * batch[name].shape[-1])
  return lengths


def window_of(batches: int) -> int:
  """How many batches are sorted together, when an epoch has so many.

  A window never crosses the end of an epoch: copies of a picture have equally long texts and would meet in a batch. So
  the batches behind the last whole window of an epoch are left out, and the window is chosen that leaves out fewest.
  """
  if batches <= WINDOW:
    return max(batches, 1)
  sizes = range(_LEAST_WINDOW, WINDOW + 1)
  return min(sizes, key=lambda size: (batches % size, -size))


def most_shapes(fields: Fields, shares: Sequence[float]) -> int:
  """How many different lengths the batches of a stage can have."""
  buckets = {field.bucket for field in fields.values()} - {None}
  return len(shares) ** len(buckets)


def cut_to(lengths: Lengths, batch: Mapping[str, np.ndarray]) -> Batch:
  """The batch with its texts cut to these lengths."""
  return {name: value[..., :lengths[name]] if name in lengths else value for name, value in batch.items()}


def sorted_batches(fields: Fields, examples: Sequence[dict], batch_size: int, order: np.ndarray) -> list[list[dict]]:
  """A window of examples as batches of similar text length.

  Args:
    order: the order in which the window's batches are given, so that training does not see short texts first.
  """
  lengths = np.zeros(len(examples), np.int64)
  for name in text_masks(fields):
    lengths += [_used(example[name]) for example in examples]
  by_length = [examples[k] for k in np.argsort(lengths, kind="stable")]
  return [by_length[k * batch_size:(k + 1) * batch_size] for k in order]


def _share(shares: Sequence[float], mask: np.ndarray) -> float:
  """The smallest share of the full length that holds the valid positions."""
  used = _used(mask)
  for share in shares:
    if used <= math.ceil(share * mask.shape[-1]):
      return share
  return 1.0


def _used(mask: np.ndarray) -> int:
  """One past the last valid position, over all rows."""
  valid = mask.reshape(-1, mask.shape[-1]).any(0)
  return int(np.flatnonzero(valid)[-1]) + 1 if valid.any() else 0
