"""Files as both packages write and compare them: whole or not at all, told apart by their SHA-256."""

import hashlib
import os

from etils import epath

from refiner_export.common.unfinished import unfinished_path

_CHUNK = 1 << 20  # bytes read at once to hash a file


def hash_file(path: epath.Path) -> str:
  """SHA-256 in hex."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while data := file.read(_CHUNK):
      digest.update(data)
  return digest.hexdigest()


def write_atomically(path: epath.Path, data: bytes) -> None:
  """Writes under a temporary name in the same folder, then renames: nobody ever sees half a file."""
  unfinished = unfinished_path(path)
  unfinished.write_bytes(data)
  unfinished.replace(path)


def is_local(path: epath.Path) -> bool:
  return "://" not in os.fspath(path)
