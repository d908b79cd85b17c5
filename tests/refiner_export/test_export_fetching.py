"""Reads that fail, hang or give something else: what is tried again, what is skipped, and what stops the export."""

import hashlib
import os
import socket
import threading

import pytest

from refiner_export.common.images import UnreadableImage
from refiner_export.common.regular_file import LARGEST_FILE, UnfitFile, read_regular
from refiner_export.common.settings import UserError
from refiner_export.export import fetching
from refiner_export.export.config import ReadingSettings
from refiner_export.sources.base import SourcePicture

GOOD = hashlib.sha256(b"data").hexdigest()


class RemoteError(Exception):
  """An error of an object store, which is no `OSError`."""
  __module__ = "gcsfs.retry"


def reads(*answers):
  """A function that gives or raises one answer after the other, and the last for ever. Its `calls` are counted."""
  def read():
    answer = answers[min(read.calls, len(answers) - 1)]
    read.calls += 1
    if isinstance(answer, Exception):
      raise answer
    return answer

  read.calls = 0
  return read


PASSING = {
    "missing": FileNotFoundError(2, "No such file or directory", "/a.jpg"), "input or output": OSError(5, "I/O error"),
    "stale": OSError(116, "Stale file handle", "/a.jpg"), "time-out": TimeoutError("no answer"),
    "reset": ConnectionResetError("reset by peer"), "denied": PermissionError(13, "Permission denied", "/a.jpg"),
    "object store": RemoteError("503")}


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("failures", range(4))
def test_a_read_that_fails_for_a_while_succeeds(kind, failures):
  read = reads(*[PASSING[kind]] * failures, b"data")
  assert fetching.fetch(SourcePicture(read), "a", ReadingSettings()) == b"data"
  assert read.calls == failures + 1


@pytest.mark.parametrize("kind", PASSING)
def test_a_read_that_always_fails_is_no_fault_of_the_picture(kind):
  read = reads(PASSING[kind])
  with pytest.raises(UnreadableImage) as skipped:
    fetching.fetch(SourcePicture(read), "a", ReadingSettings(tries=3))
  assert skipped.value.is_unread and skipped.value.reason.startswith("cannot be read: ") and read.calls == 3


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), KeyError("x")])
def test_other_errors_are_raised_at_once(error):
  read = reads(error)
  with pytest.raises(type(error)):
    fetching.fetch(SourcePicture(read), "a", ReadingSettings())
  assert read.calls == 1


def test_a_read_that_hangs_is_left_alone():
  release = threading.Event()
  with pytest.raises(UnreadableImage, match="cannot be read: no answer within 0.05 seconds") as skipped:
    fetching.fetch(SourcePicture(lambda: release.wait(60)), "a", ReadingSettings(timeout=0.05, tries=2))
  release.set()
  assert skipped.value.is_unread


def test_the_pauses_double(monkeypatch):
  pauses = []
  monkeypatch.setattr(fetching.time, "sleep", pauses.append)
  monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.5)
  with pytest.raises(UnreadableImage):
    fetching.fetch(SourcePicture(reads(OSError("x"))), "a", ReadingSettings())
  assert pauses == [0.5, 1, 2]


@pytest.mark.parametrize("stated, answers, calls", [
    (GOOD, [b"data"], 1), (GOOD.upper(), [b"data"], 1), (GOOD, [b"da", b"data"], 2), (GOOD, [b"da"], 4),
    ("", [b"da"], 1)])
def test_the_checksum_of_the_source(stated, answers, calls):
  """Half a file is read again; a file that never is what the source states is damaged."""
  read = reads(*answers)
  picture = SourcePicture(read, sha256=stated)
  if answers[-1] == b"data" or not stated:
    assert fetching.fetch(picture, "a", ReadingSettings()) == answers[-1]
  else:
    with pytest.raises(UnreadableImage, match=f"its SHA-256 is .*, the source states {GOOD}") as skipped:
      fetching.fetch(picture, "a", ReadingSettings())
    assert not skipped.value.is_unread
  assert read.calls == calls


def write(path, size):
  with path.open("wb") as file:
    file.truncate(size)
  return path


def listen(path):
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(path))
  return path


def make_pipe(path):
  os.mkfifo(path)
  return path


def make_folder(path):
  path.mkdir()
  return path


def link_to_pipe(path):
  path.symlink_to(make_pipe(path.parent / "pipe"))
  return path


UNFIT = {
    "pipe": (make_pipe, "is a pipe"), "link to a pipe": (link_to_pipe, "is a pipe"),
    "folder": (make_folder, "is a folder"),
    "device": (lambda path: "/dev/zero", "is a device"), "endless": (lambda path: "/dev/urandom", "is a device"),
    "longer than it says": (lambda path: "/proc/self/maps", "is longer than its size of 0 bytes"),
    "sparse": (lambda path: write(path, 3 << 30), f"has {3 << 30} bytes or more, the limit is {LARGEST_FILE}")}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
  make, message = UNFIT[kind]
  path = make(tmp_path / "a.jpg")
  with pytest.raises(UnfitFile, match=message):
    read_regular(path)
  with pytest.raises(UnreadableImage, match=message) as skipped:
    fetching.fetch(SourcePicture(lambda: read_regular(path)), "a", ReadingSettings())
  assert not skipped.value.is_unread


def test_a_socket_cannot_be_opened(tmp_path):
  path = listen(tmp_path / "a.jpg")
  with pytest.raises(OSError):
    read_regular(path)


@pytest.mark.parametrize("size", [0, 1, 70_000])
def test_a_regular_file_is_read_whole(tmp_path, size):
  path = tmp_path / "a.jpg"
  path.write_bytes(os.urandom(size))
  link = tmp_path / "b.jpg"
  link.symlink_to(path)
  assert read_regular(path) == read_regular(str(link)) == path.read_bytes()


@pytest.mark.parametrize("share, planned, outcomes, stops_at", [
    (0.001, 1000, "u" + "." * 999, None), (0.001, 1000, "uu", 2), (0.001, 4, "..u", 3), (0, 9, "u", 1),
    (0.5, 4, "uu..", None), (0.5, 4, "uuu", 3), (1, 3, "uuu", None), (0.1, None, "." * 50 + "u" * 9, "end"),
    (0.1, None, "u" * 10, 10), (0.1, None, "u" * 5 + "." * 45, None), (0.001, 10, "c" * 10, None)])
def test_the_share_of_what_cannot_be_read(share, planned, outcomes, stops_at):
  """u: cannot be read; c: damaged; a full stop: good."""
  limit, stopped = fetching.UnreadLimit(share, planned), None
  for position, outcome in enumerate(outcomes, start=1):
    found = None if outcome == "." else UnreadableImage("a", "why", is_unread=outcome == "u")
    try:
      limit.add(found)
    except UserError as error:
      stopped = position
      assert "cannot be read now; the first: a: why: " in str(error) and "config.runner.reading.unread=" in str(error)
      break
  if stopped is None:
    try:
      limit.end()
    except UserError:
      stopped = "end"
  assert stopped == stops_at
