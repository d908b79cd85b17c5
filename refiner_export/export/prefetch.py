"""Work that threads do ahead of the code that uses its results."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], batches: Iterable[Sequence[Item]], threads: int, ahead: int,
) -> Iterator[tuple[Sequence[Item], list[Result]]]:
  """Yields each batch with the results of `function` for its items, in order.

  While a batch is being used, threads work on the next `ahead` batches and on no more, because results are large. An
  exception of the function is raised here when its batch's turn comes. A caller that may stop early must close the
  iterator: work that has not begun is then dropped.
  """
  pool, waiting = ThreadPoolExecutor(threads, "prefetch"), collections.deque()
  try:
    for batch in batches:
      waiting.append((batch, [pool.submit(function, item) for item in batch]))
      if len(waiting) > ahead:
        yield _ready(*waiting.popleft())
    while waiting:
      yield _ready(*waiting.popleft())
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _ready(batch, futures):
  return batch, [future.result() for future in futures]
