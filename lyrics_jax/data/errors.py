"""Errors of one example name their record."""

import contextlib
from collections.abc import Iterator

from refiner_export.common.settings import UserError
from refiner_export.records.record import Record, RecordError


@contextlib.contextmanager
def about(record: Record) -> Iterator[None]:
  """Turns a `UserError` that is raised inside into a `RecordError` that names the record."""
  try:
    yield
  except UserError as error:
    raise RecordError(f"record {record.id}: {error}") from error
