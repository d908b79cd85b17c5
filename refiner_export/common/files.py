"""How both packages write and compare files: a file is written whole or not at all, and SHA-256 tells files apart."""

import hashlib
import os

from etils import epath

from refiner_export.common.unfinished import unfinished_path

_CHUNK = 1 << 20  # bytes that are read at once to hash a file


def hash_file(path: epath.Path) -> str:
  """The SHA-256 of a file, in hex."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while data := file.read(_CHUNK):
      digest.update(data)
  return digest.hexdigest()


def write_atomically(path: epath.Path, data: bytes) -> None:
  """Writes under a temporary name in the same folder, then renames. So nobody ever sees half a file."""
  unfinished = unfinished_path(path)
  unfinished.write_bytes(data)
  unfinished.replace(path)


def is_local(path: epath.Path) -> bool:
  """Whether the path is on a disk, not in an object store such as gs://."""
  return "://" not in os.fspath(path)
