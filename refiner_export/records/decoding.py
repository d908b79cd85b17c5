"""Turns what a decoder says of bytes that are no record into a `RecordError` of one line."""

import contextlib
from collections.abc import Iterator

from refiner_export.records.record import RecordError


@contextlib.contextmanager
def decoding(version: int) -> Iterator[None]:
  """Around code that takes the fields of a record of schema `version` apart."""
  try:
    yield
  except RecordError:
    raise
  except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # bad UTF-8 is a ValueError
    raise RecordError(f"not a record of schema {version}: {' '.join(str(error).split())[:200]}") from error
