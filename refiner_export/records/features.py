"""How rows of features are stored, and what storing them costs in bytes and in exactness."""

import dataclasses
import math
from collections.abc import Iterable

import ml_dtypes
import numpy as np

FEATURE_WIDTH = 256
FEATURE_DTYPES = ("float16", "bfloat16", "int8")

# TFDS has no bfloat16: such a number travels as its bits.
_STORED = {"float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}
_INT8_STEPS = 127


def stored_dtype(dtype: str) -> type:
  """The NumPy type of the numbers in a record whose features are of `dtype`."""
  return _STORED[dtype]


def store(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """float32 (N, W) -> the numbers that a record carries, and float16 scales: one per row for int8, else none.

  The error of a value v is at most 2^-11 |v| for float16 (2^-24 for the smallest values), 2^-8 |v| for
  bfloat16, and half a scale for int8, whose scale is 1/127 of the row's largest value.

  Raises:
    ValueError: float16 cannot hold a value.
  """
  if dtype == "bfloat16":
    return rows.astype(ml_dtypes.bfloat16).view(np.uint16), np.zeros(0, np.float16)
  # A value out of range becomes infinite. The check below refuses it.
  with np.errstate(over="ignore"):
    if dtype == "float16":
      stored, scales = rows.astype(np.float16), np.zeros(0, np.float16)
    else:
      # The scale is rounded up to float16 first, so that the largest value of a row still fits 127 steps.
      largest = (np.abs(rows).max(axis=1, initial=0) / _INT8_STEPS).astype(np.float16)
      scales = np.nextafter(largest, np.float16(np.inf))
      stored = np.rint(rows / scales[:, None].astype(np.float32)).astype(np.int8)
  if not (np.isfinite(stored).all() and np.isfinite(scales).all()):
    raise ValueError(f"a feature of {np.abs(rows).max():.3g} is too large for features.dtype={dtype}: take bfloat16")
  return stored, scales


def restore(stored: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
  """What `store` made, as float32 (N, W)."""
  if dtype == "bfloat16":
    return stored.view(ml_dtypes.bfloat16).astype(np.float32)
  if dtype == "float16":
    return stored.astype(np.float32)
  return stored.astype(np.float32) * scales[:, None].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class FeatureSums:
  """What features cost and lose in a record, a shard or a directory. Sums of parts are the sums of the whole.

  Attributes:
    feature_bytes: bytes of detector rows and object rows, of their scales and of the detector rows' boxes.
    feature_rows: number of detector rows and object rows.
    squared_values: the sum of the squares of all values that the refiner gave.
    squared_errors: the sum of the squares of a reader's value minus the refiner's value.
    cosines: the sum over rows of the cosine between a reader's row and the refiner's row; 1 for a row of zeros.
  """
  feature_bytes: int = 0
  feature_rows: int = 0
  squared_values: float = 0.0
  squared_errors: float = 0.0
  cosines: float = 0.0

  @classmethod
  def of(cls, given: np.ndarray, read: np.ndarray, size: int) -> "FeatureSums":
    """The sums for rows that the refiner gave and for the same rows as a reader gets them.

    Args:
      given, read: float32 (N, W).
      size: bytes that the record takes for them.
    """
    given, read = given.astype(np.float64), read.astype(np.float64)
    values, errors = _dot(given, given), _dot(read - given, read - given)
    lengths = np.sqrt(values * _dot(read, read))
    # Two equal rows may both be zero; there is no angle between them.
    cosines = np.where(errors == 0, 1.0, _dot(given, read) / np.where(lengths > 0, lengths, 1.0))
    return cls(size, len(given), float(values.sum()), float(errors.sum()), float(cosines.sum()))

  @classmethod
  def total(cls, parts: Iterable["FeatureSums"]) -> "FeatureSums":
    """The sum of the parts. It is rounded once, so that it is the same for any order of the parts."""
    totals = []
    for column in zip(*map(dataclasses.astuple, parts)):
      totals.append(sum(column) if isinstance(column[0], int) else math.fsum(column))
    return cls(*totals)

  @property
  def relative_rmse(self) -> float:
    """The root of the mean squared error over the root of the mean squared value."""
    return math.sqrt(self.squared_errors / self.squared_values) if self.squared_values else 0.0

  @property
  def mean_cosine(self) -> float:
    return self.cosines / self.feature_rows if self.feature_rows else 1.0


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(N, W) and (N, W) -> (N,): the product of row i of `a` with row i of `b`."""
  return np.einsum("nw,nw->n", a, b)
