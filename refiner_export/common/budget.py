"""Memory that several threads share: a thread waits until what it needs is free."""

import contextlib
import threading
from collections.abc import Iterator


class Budget:
  """So many bytes for all threads together. Who needs more than there is gets everything, and works alone."""

  def __init__(self, size: int):
    self.size = size
    self._taken, self._changed = 0, threading.Condition()

  @contextlib.contextmanager
  def take(self, size: int) -> Iterator[None]:
    """Holds `size` bytes for as long as the block runs. A block must not take a second time."""
    size = min(size, self.size)
    with self._changed:
      self._changed.wait_for(lambda: self._taken + size <= self.size or not self._taken)
      self._taken += size
    try:
      yield
    finally:
      with self._changed:
        self._taken -= size
        self._changed.notify_all()
