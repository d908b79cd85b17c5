"""Text lengths in buckets: a batch is cut to the shortest bucket that holds all its texts.

`config.data.buckets` are shares of the full lengths (`spatial_length`, `caption_length`, `llm_length`), so a step compiles at
most once per bucket. Examples of one window of several batches are sorted by length before they are batched; otherwise
nearly every large batch would hold one long text.
"""

import math

import numpy as np

from lyrics_jax.config import DataConfig

WINDOW = 8  # batches that are sorted together

_LENGTH_OF = {  # of the second axis of each text array
    "spatial_ids": "spatial_length", "spatial_mask": "spatial_length", "msp_ids": "spatial_length", "msp_targets": "spatial_length",
    "caption_ids": "caption_length", "caption_mask": "caption_length", "icg_ids": "caption_length",
    "instruction_ids": "caption_length", "instruction_mask": "caption_length",
    "llm_ids": "llm_length", "llm_mask": "llm_length", "llm_targets": "llm_length", "image_slot": "llm_length"}
_MASKS = [name for name in _LENGTH_OF if name.endswith("_mask")]


def bucket_length(data: DataConfig, bucket: int, name: str) -> int:
  """Tokens of text array `name` in bucket number `bucket`."""
  return math.ceil(data.buckets[bucket] * getattr(data, _LENGTH_OF[name]))


def bucket_of(data: DataConfig, arrays: dict[str, np.ndarray]) -> int:
  """The first bucket that holds every text of an example (arrays [T]) or of a batch (arrays [B, T])."""
  used = {name: _used(arrays[name]) for name in _MASKS if name in arrays}
  return next(bucket for bucket in range(len(data.buckets))
              if all(count <= bucket_length(data, bucket, name) for name, count in used.items()))


def cut(data: DataConfig, batch: dict[str, np.ndarray], bucket: int) -> dict[str, np.ndarray]:
  """The batch with its texts cut to a bucket that holds them."""
  return {name: value[:, :bucket_length(data, bucket, name)] if name in _LENGTH_OF else value for name, value in batch.items()}


def sorted_batches(examples: list[dict], batch_size: int, order: np.ndarray) -> list[list[dict]]:
  """A window of examples as batches of similar text length.

  Args:
    order: the order in which the window's batches are given, so that training does not see short texts first.
  """
  lengths = [sum(_used(example[name]) for name in _MASKS if name in example) for example in examples]
  by_length = [examples[k] for k in np.argsort(lengths, kind="stable")]
  return [by_length[k * batch_size:(k + 1) * batch_size] for k in order]


def _used(mask: np.ndarray) -> int:
  """One past the last valid position, over all rows."""
  valid = mask.reshape(-1, mask.shape[-1]).any(0)
  return int(np.flatnonzero(valid)[-1]) + 1 if valid.any() else 0
