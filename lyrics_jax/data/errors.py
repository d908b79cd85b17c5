"""Errors of one example name their record."""

import contextlib
from collections.abc import Iterator

from refiner_export.records.record import Record, RecordError
from refiner_export.common.settings import UserError


@contextlib.contextmanager
def about(record: Record) -> Iterator[None]:
  """Turns a `UserError` raised while the example of `record` is made into a `RecordError` that says which record."""
  try:
    yield
  except UserError as error:
    raise RecordError(f"record {record.id}: {error}") from error
