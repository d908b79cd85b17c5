"""Progress of export, verification and evaluation: the lines elsewhere than on a terminal."""

import itertools

import pytest

from refiner_export.common import progress as module
from refiner_export.common.progress import Progress, chunks


@pytest.fixture
def clock(monkeypatch):
  """Each look at the clock is four seconds later; lines are ten seconds apart."""
  ticks = itertools.count(0, 4)
  monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))


def test_lines_come_from_time_to_time_and_at_the_end(clock, capsys):
  with Progress(6, unit="record") as progress:
    for _ in range(6):
      progress.add(1)
  said = capsys.readouterr()
  assert said.out == "" and said.err.splitlines() == [
      "3 of 6 records, 0.2 per second, 12 s left", "6 of 6 records, 0.2 per second, 0 s left"]


def test_a_number_that_nobody_knows_beforehand(clock, capsys):
  with Progress(None, unit="example") as progress:
    for _ in range(3):
      progress.advance(0, 2, 1)
  assert capsys.readouterr().err == "6 examples, 3 skipped, 0.5 per second\n"


def test_chunks(clock, capsys):
  assert [list(chunk) for chunk in chunks(range(5), 2, "question")] == [[0, 1], [2, 3], [4]]
  assert capsys.readouterr().err == "5 of 5 questions, 0.4 per second, 0 s left\n"
  assert list(chunks([], 2, "question")) == []


def test_lines_of_a_result_go_to_stdout(capsys):
  with Progress(3, unit="record") as progress:
    progress.write("record 2 is wrong")
  assert capsys.readouterr().out == "record 2 is wrong\n"
