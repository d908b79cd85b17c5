"""How far a long evaluation is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from absl import logging
from tqdm import tqdm

_INTERVAL = 10.0  # seconds between two lines
Item = TypeVar("Item")


def chunks(items: Sequence[Item], size: int, unit: str) -> Iterator[Sequence[Item]]:
  """The items in order, at most `size` at a time; says how many are done whenever it is asked for more."""
  with tqdm(total=len(items), unit=unit, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
    start = spoken = time.monotonic()
    for done in range(0, len(items), size):
      chunk = items[done:done + size]
      yield chunk
      bar.update(len(chunk))
      done, now = done + len(chunk), time.monotonic()
      if bar.disable and (now - spoken >= _INTERVAL or done == len(items)):
        spoken, left = now, (now - start) / done * (len(items) - done)
        logging.info("%d of %d %ss, %.1f per second, %.0f s left", done, len(items), unit, done / (now - start), left)
