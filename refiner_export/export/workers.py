"""The runner of one machine: shards are made in this process, or by several that take one after the other.

Workers are fresh processes (`spawn`), so that neither CUDA nor threads are there before them. Each has a pipe of its
own and nothing else in common with the others: one that is killed cannot hold a lock that they wait for.
"""

import collections
import functools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from refiner_export.export.config import ExportConfig
from refiner_export.export.plan import Plan
from refiner_export.common.progress import Progress
from refiner_export.common.settings import UserError
from refiner_export.export.shard import export_shard
from refiner_export.common.unfinished import remove_abandoned


def run_locally(plan: Plan, numbers: Sequence[int]) -> None:
  """Makes these shards with `config.runner.workers` processes.

  Raises:
    UserError: what `export_shard` raised, or a worker died.
    RuntimeError: another error of a worker, with its traceback.
  """
  workers = min(plan.config.runner.workers, len(numbers))
  pictures = sum(len(plan.examples_of(number)) for number in numbers)
  with Progress(pictures, workers) as progress:
    if workers > 1:
      _Crew(plan, numbers, progress).run(workers)
      return
    for number in numbers:
      progress.begin(0, number, len(plan.examples_of(number)))
      export_shard(plan.config, number, functools.partial(progress.advance, 0))


class _Crew:
  """Several workers and the shards that nobody has taken yet."""

  def __init__(self, plan: Plan, numbers: Sequence[int], progress: Progress):
    self._plan, self._waiting, self._progress = plan, collections.deque(numbers), progress
    self._processes: dict[Connection, multiprocessing.Process] = {}
    self._worker: dict[Connection, int] = {}
    self._shard: dict[Connection, int] = {}  # that each is at; who is not in it has ended

  def run(self, workers: int) -> None:
    try:
      for worker in range(workers):
        self._start(worker)
      while self._shard:
        for connection in wait(list(self._shard)):
          self._listen(connection)
    finally:  # whatever happened: nobody is left behind, and neither is a file
      for process in self._processes.values():
        process.terminate()
      for process in self._processes.values():
        process.join()
      remove_abandoned(self._plan.directory)

  def _start(self, worker: int) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(worker, self._plan.config, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of the pipe
    self._processes[here], self._worker[here] = process, worker
    self._assign(here)

  def _assign(self, connection: Connection) -> None:
    if not self._waiting:
      del self._shard[connection]
      return
    number = self._shard[connection] = self._waiting.popleft()
    self._progress.begin(self._worker[connection], number, len(self._plan.examples_of(number)))
    try:
      connection.send(number)
    except ConnectionError:
      raise self._death(connection) from None

  def _listen(self, connection: Connection) -> None:
    try:
      message = connection.recv()
    except (EOFError, ConnectionError):
      raise self._death(connection) from None
    match message:
      case "finished":
        self._assign(connection)
      case pictures, skipped:
        self._progress.advance(self._worker[connection], pictures, skipped)
      case Exception() as error:
        raise error

  def _death(self, connection: Connection) -> UserError:
    process = self._processes[connection]
    process.join()
    code = process.exitcode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return UserError(
        f"worker {self._worker[connection]} died at shard {self._shard[connection]} ({how}). A system that is out of "
        "memory kills with SIGKILL: lower config.runner.workers or config.batch. The same command goes on from here")


def _work(worker: int, config: ExportConfig, connection: Connection) -> None:
  """A worker's life: a shard number comes in, counts of pictures and at last "finished" or an error go out."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first of them ends the others
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _take_device(worker)
  while True:
    number = connection.recv()
    try:
      export_shard(config, number, lambda pictures, skipped: connection.send((pictures, skipped)))
      connection.send("finished")
    except UserError as error:
      connection.send(UserError(str(error)))
    except Exception:  # it may not survive the pipe
      connection.send(RuntimeError(f"worker {worker}, shard {number}:\n{traceback.format_exc()}"))


def _end_with_parent() -> None:
  """Nobody is left to tell when even the first process was killed."""
  multiprocessing.parent_process().join()
  os._exit(1)


def _take_device(worker: int) -> None:
  """Makes one GPU this process's. Who has not imported torch by now, to read its configuration, has no use for one."""
  torch = sys.modules.get("torch")
  if torch is not None and torch.cuda.is_available():
    torch.cuda.set_device(worker % torch.cuda.device_count())
