"""Reading the file of a picture: a regular file of a bounded size, and nothing that could block or never end."""

import os
import stat

from etils import epath

from refiner_export.common.files import is_local

LARGEST_FILE = 256 << 20  # bytes; a larger file counts as an attack or a mistake
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
          (stat.S_ISSOCK, "a socket"))


class UnfitFile(Exception):
  """What lies at the path can never be read as a picture. The message says why."""


def read_regular(path: epath.PathLike) -> bytes:
  """The bytes of a file.

  Raises:
    UnfitFile: it is no regular file, or it is larger than `LARGEST_FILE`.
    OSError: it cannot be read now.
  """
  if not is_local(path):
    return _read_remote(epath.Path(path))
  descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe that nobody writes to would block
  try:
    found = os.fstat(descriptor)
    for is_kind, name in _KINDS:
      if is_kind(found.st_mode):
        raise UnfitFile(f"{path} is {name}, not a regular file")
    _check_size(path, found.st_size)
    with open(descriptor, "rb", closefd=False) as file:
      data = file.read(found.st_size + 1)
  finally:
    os.close(descriptor)
  if len(data) > found.st_size:
    raise UnfitFile(f"{path} is longer than its size of {found.st_size} bytes")
  return data


def _read_remote(path: epath.Path) -> bytes:
  with path.open("rb") as file:
    data = file.read(LARGEST_FILE + 1)
  _check_size(path, len(data))
  return data


def _check_size(path: epath.PathLike, size: int) -> None:
  if size > LARGEST_FILE:
    raise UnfitFile(f"{path} has {size} bytes or more, the limit is {LARGEST_FILE}")
