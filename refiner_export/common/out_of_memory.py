"""Being out of memory ends a command with one line. It never decides what is written."""

import contextlib
from collections.abc import Iterator

from refiner_export.common.settings import UserError

_TEXTS = ("can't start new thread", "out of memory", "not enough memory")  # of errors that are no `MemoryError`


@contextlib.contextmanager
def as_one_line(what: str) -> Iterator[None]:
  """Raises `UserError` where the block runs out of memory, on the host or on an accelerator."""
  try:
    yield
  except Exception as error:
    if not _is_out_of_memory(error):
      raise
    raise UserError(f"{what}: out of memory: lower config.runner.reading.megabytes, config.runner.threads, "
                    "config.runner.workers or config.batch, and run the same command again") from error


def _is_out_of_memory(error: Exception) -> bool:
  if isinstance(error, MemoryError):
    return True
  text = str(error).lower()
  return isinstance(error, RuntimeError | OSError) and any(part in text for part in _TEXTS)
