"""Ragged rows to fixed shapes."""

from collections.abc import Sequence

import numpy as np


def pad_ids(ids: Sequence[int], length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
  """int32 (length,) with `fill` after the ids, and bool (length,), True at the ids. There are at most `length` ids."""
  padded, mask = np.full(length, fill, np.int32), np.arange(length) < len(ids)
  padded[:len(ids)] = ids
  return padded, mask


def pad_rows(rows: np.ndarray, kept: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """float32 (count, width) and bool (count,): the first `count` rows in their places, blank where not `kept`."""
  rows, kept = rows[:count], kept[:count]
  padded, mask = np.zeros((count, rows.shape[1]), np.float32), np.zeros(count, bool)
  mask[:len(kept)] = kept
  padded[:len(kept)][kept] = rows[kept]
  return padded, mask
