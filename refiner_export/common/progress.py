"""How far a long piece of work is: a bar on a terminal, elsewhere a line from time to time. Export, verification and
evaluation all use it."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tqdm

Item = TypeVar("Item")


class Progress:
  """Counts what is done, with its rate, the time that is left and how many were skipped. Writes to stderr.

  On a terminal there is one bar for everything. With several workers there is also one bar for the shard of each.
  Elsewhere there is a line at most every `INTERVAL` seconds, and one at the end.
  """
  INTERVAL = 10.0

  def __init__(self, total: int | None, workers: int = 1, unit: str = "picture"):
    """Args: total: how many there are, None where nobody knows; workers: how many advance it; unit: a singular noun."""
    self._total, self._unit = total, unit
    self._done = self._skipped = 0
    self._start = self._last_line = time.monotonic()
    self._has_bars = sys.stderr.isatty()
    self._all = self._bar(total=total, position=0, desc="all" if workers > 1 else None)
    self._workers = []
    if workers > 1:
      for worker in range(workers):
        self._workers.append(self._bar(total=1, position=1 + worker, leave=False))

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_):
    for bar in [*self._workers, self._all]:
      bar.close()

  def begin(self, worker: int, shard: int, count: int | None) -> None:
    """A worker begins a shard of `count` units."""
    if self._workers and self._has_bars:
      self._workers[worker].reset(total=count)
      self._workers[worker].set_description(f"worker {worker}, shard {shard}")

  def add(self, count: int) -> None:
    """`count` more units are done, where there is one worker and nothing is skipped."""
    self.advance(0, count, 0)

  def advance(self, worker: int, count: int, skipped: int) -> None:
    """A worker has done `count` more units and had to skip `skipped` of them."""
    self._done, self._skipped = self._done + count, self._skipped + skipped
    if self._has_bars:
      if self._skipped:
        self._all.set_postfix(skipped=self._skipped, refresh=False)
      for bar in [self._all, *self._workers[worker:worker + 1]]:
        bar.update(count)
      return
    now = time.monotonic()
    if now - self._last_line >= self.INTERVAL or self._done == self._total:
      print(self._line(now), file=sys.stderr, flush=True)
      self._last_line = now

  def write(self, line: str) -> None:
    """Prints a line to stdout without breaking the bars."""
    tqdm.tqdm.write(line, file=sys.stdout)

  def _bar(self, **options) -> tqdm.tqdm:
    return tqdm.tqdm(unit=self._unit, file=sys.stderr, dynamic_ncols=True, disable=not self._has_bars, **options)

  def _line(self, now: float) -> str:
    rate = self._done / max(now - self._start, 1e-6)
    of = "" if self._total is None else f" of {self._total}"
    line = f"{self._done}{of} {self._unit}s"
    if self._skipped:
      line += f", {self._skipped} skipped"
    line += f", {rate:.1f} per second"
    if self._total is not None and rate:
      line += f", {(self._total - self._done) / rate:.0f} s left"
    return line


def chunks(items: Sequence[Item], size: int, unit: str) -> Iterator[Sequence[Item]]:
  """The items in order, at most `size` at a time. A chunk counts as done when the next one is asked for."""
  with Progress(len(items), unit=unit) as progress:
    for start in range(0, len(items), size):
      chunk = items[start:start + size]
      yield chunk
      progress.add(len(chunk))
