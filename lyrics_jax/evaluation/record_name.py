"""Records named on the command line."""

from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import Record
from refiner_export.common.settings import require


def read_record(name: str, fingerprint: str) -> Record:
  """The record `DIR#K`, K counted from 0, which the refiner `fingerprint` must have made. Raises `UserError`."""
  path, _, position = name.rpartition("#")
  require(bool(path) and position.isdecimal(), f"--record={name}: expected DIR#K, for example records#0")
  directory = RecordDirectory(path, fingerprint)
  require(int(position) < len(directory), f"--record={name}: {path} holds records 0 to {len(directory) - 1}")
  return directory[int(position)]
