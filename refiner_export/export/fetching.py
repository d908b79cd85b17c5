"""Getting the bytes of pictures from storage that fails, hangs, or gives half a file now and then.

A read has a time-out and is tried again after a pause. What fails every time is skipped, but such a skip says nothing
about the picture: it is marked, only a small share of them is allowed, and another run tries them again.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from refiner_export.common.images import UnreadableImage
from refiner_export.common.regular_file import UnfitFile
from refiner_export.common.settings import require
from refiner_export.export.config import ReadingSettings
from refiner_export.sources.base import SourcePicture

FIRST_PAUSE = 0.5  # seconds before the second try; each later pause is twice as long
_PATIENCE = 10  # skips in a shard of unknown size before their share counts
# Packages of object stores, whose errors are no OSError.
_REMOTE = {"aiohttp", "gcsfs", "s3fs", "botocore", "google", "fsspec"}


def fetch(picture: SourcePicture, id: str, settings: ReadingSettings) -> bytes:
  """The bytes of a picture.

  Raises:
    UnreadableImage: no try gave the bytes; or they never had the checksum that the source states; or what lies there
      can never be read.
  """
  for attempt in range(settings.tries):
    if attempt:
      time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
    try:
      data = _within(settings.timeout, picture.read)
    except UnfitFile as error:
      raise UnreadableImage(id, str(error)) from error
    except Exception as error:
      if not _is_of_storage(error):
        raise
      problem = UnreadableImage(id, _reason(error), is_unread=True)
      continue
    found = hashlib.sha256(data).hexdigest() if picture.sha256 else ""
    if found == picture.sha256.lower():
      return data
    problem = UnreadableImage(id, f"its SHA-256 is {found}, the source states {picture.sha256}")
  raise problem


def _within(seconds: float, function: Callable[[], bytes]) -> bytes:
  """What the function returns. A function that takes longer is left alone in its thread, because nothing can end it."""
  future = Future()

  def run() -> None:
    try:
      future.set_result(function())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, daemon=True, name="read").start()  # a daemon, so that nobody waits for it at the end
  try:
    return future.result(seconds)
  except TimeoutError:
    if future.done():
      raise
    raise TimeoutError(f"no answer within {seconds:g} seconds") from None


def _is_of_storage(error: Exception) -> bool:
  return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _REMOTE


def _reason(error: Exception) -> str:
  if isinstance(error, OSError) and error.filename is not None:
    return f"cannot be read: {error.strerror or error}: {error.filename}"
  return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


class UnreadLimit:
  """Counts the skips of one shard that are not the pictures' fault.

  Args:
    share: of the shard's examples, the largest that may be skipped.
    planned: how many examples the shard has; None when only reading it tells.
  """

  def __init__(self, share: float, planned: int | None):
    self._share, self._planned = share, planned
    self._unread = self._done = 0
    self._first = ""

  def add(self, found: UnreadableImage | None) -> None:
    """Counts an example, with what was wrong with it. Raises `UserError` once too many could not be read."""
    self._done += 1
    if found is None or not found.is_unread:
      return
    self._unread += 1
    self._first = self._first or str(found)
    if self._planned is not None:
      self._check(self._planned)
    elif self._unread >= _PATIENCE:
      self._check(self._done)

  def end(self) -> None:
    """Checks the whole shard. Raises `UserError`."""
    self._check(self._done)

  def _check(self, examples: int) -> None:
    require(self._unread <= self._share * examples,
            f"{self._unread} of {examples} examples of a shard cannot be read now; the first: {self._first}: mend the "
            f"storage and run the same command again, or allow more with config.runner.reading.unread={self._share}")
