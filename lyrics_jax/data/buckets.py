"""Text lengths in buckets: the texts of a batch are cut to the shortest buckets that hold them.

`config.data.buckets` are shares of the full lengths (`spatial_length`, `caption_length`, `llm_length`). Captions have a bucket
of their own, all other texts share one, so a step compiles at most `most_shapes` times: a stage without captions once per
bucket. Examples of one window of several batches are sorted by length before they are batched; otherwise nearly every
large batch would hold one long text.
"""

import math

import numpy as np

from lyrics_jax.config import DataConfig

WINDOW = 8  # batches that are sorted together

Lengths = dict[str, int]  # tokens of each text array, by the array's name

_LENGTH_OF = {  # of the second axis of each text array
    "spatial_ids": "spatial_length", "spatial_mask": "spatial_length", "msp_ids": "spatial_length", "msp_targets": "spatial_length",
    "caption_ids": "caption_length", "caption_mask": "caption_length", "icg_ids": "caption_length",
    "instruction_ids": "caption_length", "instruction_mask": "caption_length",
    "llm_ids": "llm_length", "llm_mask": "llm_length", "llm_targets": "llm_length", "image_slot": "llm_length"}
_MASKS = [name for name in _LENGTH_OF if name.endswith("_mask")]
_CAPTION = {"caption_ids", "caption_mask", "icg_ids"}


def lengths_of(data: DataConfig, batch: dict[str, np.ndarray]) -> Lengths:
  """The lengths to which the texts of a batch, arrays [B, T], can be cut; also of an example, arrays [T].

  Of several hosts' lengths the greatest, array by array, hold the texts of all of them.
  """
  lengths = {}
  for group in (_CAPTION, _LENGTH_OF.keys() - _CAPTION):
    names = [name for name in batch if name in group]
    used = {name: _used(batch[name]) for name in names if name in _MASKS}
    share = next(share for share in data.buckets
                 if all(count <= _length(data, share, name) for name, count in used.items()))
    lengths |= {name: _length(data, share, name) for name in names}
  return lengths


def most_shapes(data: DataConfig, lengths: Lengths) -> int:
  """How many different lengths the batches of a stage can have, given those of one batch."""
  return len(data.buckets) ** len({name in _CAPTION for name in lengths})


def cut_to(lengths: Lengths, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The batch with its texts cut to lengths that hold them."""
  return {name: value[:, :lengths[name]] if name in lengths else value for name, value in batch.items()}


def sorted_batches(examples: list[dict], batch_size: int, order: np.ndarray) -> list[list[dict]]:
  """A window of examples as batches of similar text length.

  Args:
    order: the order in which the window's batches are given, so that training does not see short texts first.
  """
  lengths = [sum(_used(example[name]) for name in _MASKS if name in example) for example in examples]
  by_length = [examples[k] for k in np.argsort(lengths, kind="stable")]
  return [by_length[k * batch_size:(k + 1) * batch_size] for k in order]


def _length(data: DataConfig, share: float, name: str) -> int:
  return math.ceil(share * getattr(data, _LENGTH_OF[name]))


def _used(mask: np.ndarray) -> int:
  """One past the last valid position, over all rows."""
  valid = mask.reshape(-1, mask.shape[-1]).any(0)
  return int(np.flatnonzero(valid)[-1]) + 1 if valid.any() else 0
