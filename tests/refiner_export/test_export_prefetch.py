"""Threads that work ahead, and the lines and bars that tell how far they are."""

import io
import sys
import threading

import pytest

from refiner_export.export.prefetch import prefetch
from refiner_export.common.progress import Progress


def test_results_keep_their_order():
  ended = [threading.Event() for _ in range(5)]

  def square(k):
    if k in (0, 1, 3):  # within its batch, each waits for the one behind it
      assert ended[k + 1].wait(30)
    ended[k].set()
    return k * k

  assert list(prefetch(square, [[0, 1, 2], [3, 4]], threads=3, ahead=1)) == [([0, 1, 2], [0, 1, 4]), ([3, 4], [9, 16])]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_batches_than_asked_are_ahead(ahead):
  taken = []

  def batches():
    for k in range(10):
      taken.append(k)
      yield [k]

  for used, (batch, results) in enumerate(prefetch(lambda k: -k, batches(), threads=2, ahead=ahead)):
    assert batch == [used] and results == [-used]
    assert len(taken) == min(used + 1 + ahead, 10)


def test_work_is_done_while_a_batch_is_used():
  second = threading.Event()
  ready = prefetch(lambda k: second.set() if k else None, [[0], [1]], threads=1, ahead=1)
  next(ready)
  assert second.wait(30)
  ready.close()


def test_an_error_comes_at_its_batch():
  ready = prefetch(lambda k: 1 / k, [[1], [0], [1]], threads=2, ahead=2)
  assert next(ready) == ([1], [1.0])
  with pytest.raises(ZeroDivisionError):
    next(ready)
  assert list(ready) == []


def test_who_stops_early_waits_for_nothing():
  begun, release, ran = threading.Event(), threading.Event(), []

  def work(k):
    ran.append(k)
    if k:
      begun.set()
      release.wait(30)

  ready = prefetch(work, [[0], [1, 2, 3]], threads=1, ahead=1)
  next(ready)
  assert begun.wait(30)
  ready.close()
  release.set()
  assert ran == [0, 1]


def test_lines_of_progress(capsys, monkeypatch):
  monkeypatch.setattr(Progress, "INTERVAL", 0.0)
  with Progress(6, workers=1) as progress:
    progress.begin(0, 0, 6)
    progress.advance(0, 4, 1)
    progress.advance(0, 2, 0)
  first, last = capsys.readouterr().err.splitlines()
  assert first.startswith("4 of 6 pictures, 1 skipped, ") and first.endswith(" s left") and " per second, " in first
  assert last.startswith("6 of 6 pictures, 1 skipped, ") and last.endswith(" per second, 0 s left")


def test_bars_of_progress(capsys, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with Progress(8, workers=2) as progress:
    progress.begin(1, 7, 4)
    progress.advance(1, 4, 3)
  shown = terminal.getvalue()
  assert "worker 1, shard 7" in shown and "skipped=3" in shown and "| 4/8 [" in shown and "picture/s" in shown
  assert capsys.readouterr().out == ""
