"""What an object store says when it fails, in one line. Its library has tried again by then, several times."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from refiner_export.common.files import is_local, reason
from refiner_export.common.settings import UserError

_LIBRARIES = ("gcsfs", "google", "s3fs", "botocore", "adlfs", "azure", "aiohttp", "requests",
              "fsspec")


@contextlib.contextmanager
def store_errors(path: epath.PathLike) -> Iterator[None]:
  """Around work on a place that may be remote. Errors of a store's library become a `UserError`; others pass."""
  try:
    yield
  except Exception as error:
    library = type(error).__module__.partition(".")[0]
    is_of_store = library in _LIBRARIES or isinstance(error, OSError)  # a time-out is an OSError too
    if isinstance(error, UserError) or is_local(path) or not is_of_store:
      raise
    raise UserError(f"{os.fspath(path)}: the store cannot be used now ({reason(error)}): run the same command "
                    "again") from error
