"""How far an export is: bars on a terminal, elsewhere a line from time to time."""

import sys
import time

import tqdm


class Progress:
  """Counts pictures as workers refine them, with their rate, the time that is left and how many were skipped.

  On a terminal there is one bar for all, and one for the shard of each worker where there are several. Elsewhere there
  is a line at most every `INTERVAL` seconds, and one at the end.
  """
  INTERVAL = 10.0

  def __init__(self, pictures: int, workers: int):
    self._bars = sys.stderr.isatty()
    self._pictures, self._done, self._skipped = pictures, 0, 0
    self._start = self._spoken = time.monotonic()
    bar = lambda **options: tqdm.tqdm(unit="picture", file=sys.stderr, disable=not self._bars, **options)
    self._all = bar(total=pictures, position=0, desc="all")
    self._workers = [bar(total=1, position=1 + k, leave=False) for k in range(workers)] if workers > 1 else []

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_):
    for bar in [*self._workers, self._all]:
      bar.close()

  def begin(self, worker: int, shard: int, pictures: int) -> None:
    """A worker begins a shard of so many pictures."""
    if self._workers and self._bars:
      self._workers[worker].reset(total=pictures)
      self._workers[worker].set_description(f"worker {worker}, shard {shard}")

  def advance(self, worker: int, pictures: int, skipped: int) -> None:
    """A worker has refined so many pictures more, of which it had to skip some."""
    self._done, self._skipped = self._done + pictures, self._skipped + skipped
    if self._bars:
      self._all.set_postfix(skipped=self._skipped, refresh=False)
      for bar in [self._all, *self._workers[worker:worker + 1]]:
        bar.update(pictures)
      return
    now = time.monotonic()
    if now - self._spoken >= self.INTERVAL or self._done == self._pictures:
      rate = self._done / max(now - self._start, 1e-6)
      print(f"{self._done} of {self._pictures} pictures, {self._skipped} skipped, {rate:.1f} per second, "
            f"{(self._pictures - self._done) / rate:.0f} s left", flush=True)
      self._spoken = now
