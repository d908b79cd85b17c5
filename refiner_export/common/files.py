"""How both packages write and compare files: a file is written whole or not at all, and SHA-256 tells files apart."""

import contextlib
import hashlib
import os
from collections.abc import Iterator

from etils import epath

from refiner_export.common.settings import UserError
from refiner_export.common.unfinished import unfinished_path

_CHUNK = 1 << 20  # bytes that are read at once to hash a file
_LONGEST_PATH = 2000  # characters of a name with its folders; Linux allows 4095 bytes in all
_LONGEST_NAME = 255  # bytes that the name of a file or of a folder may have


def hash_file(path: epath.Path) -> str:
  """The SHA-256 of a file, in hex."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while data := file.read(_CHUNK):
      digest.update(data)
  return digest.hexdigest()


def write_atomically(path: epath.Path, data: bytes) -> None:
  """Writes under a temporary name in the same folder, then renames. So nobody ever sees half a file.

  Raises `UserError` when the file cannot be written.
  """
  unfinished = unfinished_path(path)
  with writing(path):
    try:
      unfinished.write_bytes(data)
      unfinished.replace(path)
    except OSError:
      with contextlib.suppress(OSError):
        unfinished.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
  """Turns what the system says of a full disk or of a place that nobody may write into a `UserError` of one line."""
  try:
    yield
  except OSError as error:
    raise UserError(f"{os.fspath(path)}: cannot be written ({reason(error)}): make room, or name another "
                    "place") from error


def reason(error: Exception) -> str:
  """What an error says, in one line; an error of the system says what it is and which file it is about."""
  text = str(error)
  if isinstance(error, OSError) and error.strerror:
    text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
  return " ".join(text.split())[:200] or type(error).__name__


def is_local(path: epath.Path) -> bool:
  """Whether the path is on a disk, not in an object store such as gs://."""
  return "://" not in os.fspath(path)


def stamp(path: epath.PathLike) -> str:
  """The size of a file and when it was last written: what tells an edited file apart without reading it.

  Raises:
    OSError: there is no such file.
  """
  if is_local(path):
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns}"
  found = epath.Path(path).stat()
  return f"{found.length} {found.mtime}"


def is_inside(folder: epath.PathLike, name: str) -> bool:
  """Whether a name from a file of somebody else stays in the folder: no `..`, no root, no link that leads outside.

  A name that no file can have is in no folder.
  """
  parts = name.replace("\\", "/").split("/")
  for part in parts:
    if len(part.encode(errors="replace")) > _LONGEST_NAME:
      return False
  if not name or len(name) > _LONGEST_PATH or "\0" in name or "://" in name or ".." in parts or os.path.isabs(name):
    return False
  if not is_local(folder):
    return True
  root = os.path.realpath(folder)
  return os.path.realpath(os.path.join(root, name)).startswith(os.path.join(root, ""))
