"""Files that are being written: under names that nobody else takes, and removed when their writer has died.

Whoever makes a file writes it under `unfinished_path` and renames it: nobody ever sees half of it, and of two processes
that write the same one, the last to end wins.
"""

import itertools
import os
import re
import socket
import time
import uuid

from etils import epath

_OLD = 24 * 3600  # seconds since the last write, after which the process of another machine is taken for dead
_PROCESS = uuid.uuid4().hex[:8]  # a restarted container often has the host name and the process id of the one before
_COUNT = itertools.count()
_NAME = re.compile(r"\.unfinished\.(?P<host>.+)\+(?P<pid>\d+)\+(?P<process>[0-9a-f]{8})\+\d+\..+")


def unfinished_path(path: epath.PathLike) -> epath.Path:
  """A hidden name in the same folder, another one at each call in any process on any machine."""
  path = epath.Path(path)
  return path.parent / f".unfinished.{_host()}+{os.getpid()}+{_PROCESS}+{next(_COUNT)}.{path.name}"


def remove_abandoned(directory: epath.PathLike) -> None:
  """Removes what processes left that no longer run; of other machines, what nobody has written to for a day.

  Object stores are left alone: they keep nothing half-written, and fsspec would remember a list of what they hold for
  longer than it is true.
  """
  if "://" in os.fspath(directory):
    return
  for path in epath.Path(directory).iterdir():
    found = _NAME.fullmatch(path.name)
    if found and _is_abandoned(path, found["host"], int(found["pid"]), found["process"]):
      path.unlink(missing_ok=True)


def _is_abandoned(path: epath.Path, host: str, pid: int, process: str) -> bool:
  if host == _host():
    return process != _PROCESS if pid == os.getpid() else not _is_running(pid)
  try:
    written = path.stat().mtime
  except FileNotFoundError:  # finished in this moment
    return False
  return written < time.time() - _OLD


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # it runs, as another user
    return True
  return not _has_ended(pid)


def _has_ended(pid: int) -> bool:
  """Whether the process only waits to be asked for its exit code; in a container there may be nobody who ever asks."""
  try:
    state = epath.Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
  except OSError:  # not Linux, or gone in this moment
    return False
  return state in (b"Z", b"X")


def _host() -> str:
  """This machine, or this container: containers may share their host's name, but their process ids are their own."""
  try:
    space = os.stat("/proc/self/ns/pid").st_ino
  except OSError:  # not Linux
    space = 0
  return f"{socket.gethostname()}-{space}"
