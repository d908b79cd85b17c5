"""Files that are being written. Each has a name that nobody else takes, and is removed when its writer has died.

A process writes a file under `unfinished_path` and then renames it, so nobody ever sees half of it. When two processes
write the same file, the one that ends last wins.
"""

import itertools
import os
import re
import socket
import time
import uuid

from etils import epath

_OLD = 24 * 3600  # a process of another machine counts as dead when it has not written for so many seconds
_PROCESS = uuid.uuid4().hex[:8]  # a restarted container often has the same host name and process id as before
_COUNT = itertools.count()
_NAME = re.compile(r"\.unfinished\.(?P<host>.+)\+(?P<pid>\d+)\+(?P<process>[0-9a-f]{8})\+\d+\..+")


def unfinished_path(path: epath.PathLike) -> epath.Path:
  """A hidden name in the same folder. No two calls give the same name, in any process on any machine."""
  path = epath.Path(path)
  return path.parent / f".unfinished.{_host()}+{os.getpid()}+{_PROCESS}+{next(_COUNT)}.{path.name}"


def remove_abandoned(directory: epath.PathLike) -> None:
  """Removes the unfinished files of processes that no longer run.

  This machine cannot see the processes of other machines: their files go when nobody has written to them for a day.
  Object stores are left alone: they keep nothing half-written, and fsspec would remember a list of their files for
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
  except FileNotFoundError:  # its writer has just renamed it
    return False
  return written < time.time() - _OLD


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # another user runs it
    return True
  return not _has_ended(pid)


def _has_ended(pid: int) -> bool:
  """Whether the process has ended and waits until its parent reads the exit code. In a container nobody may read it."""
  try:
    state = epath.Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
  except OSError:  # this is not Linux, or the process has just gone
    return False
  return state in (b"Z", b"X")


def _host() -> str:
  """This machine, or this container: containers may share their host's name, but their process ids are their own."""
  try:
    space = os.stat("/proc/self/ns/pid").st_ino
  except OSError:  # not Linux
    space = 0
  return f"{socket.gethostname()}-{space}"
