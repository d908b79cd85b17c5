"""The runner of one machine: shards are made in this process, or by several processes that take one after the other.

Workers are fresh processes (`spawn`), so that neither CUDA nor threads are there before them. Each worker has its own
pipe and shares nothing else with other workers: a worker that is killed cannot hold a lock that others wait for.
"""

import collections
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from refiner_export.common.progress import Progress
from refiner_export.common.settings import UserError
from refiner_export.common.unfinished import remove_abandoned
from refiner_export.export.config import ExportConfig
from refiner_export.export.plan import ExportPlan
from refiner_export.export.shard import export_shard


def run_locally(plan: ExportPlan, numbers: Sequence[int]) -> None:
  """Makes these shards with `config.runner.workers` processes.

  Raises:
    UserError: what `export_shard` raised; or a worker died; or workers cannot import a class of the configuration.
    RuntimeError: another error of a worker, with its traceback.
  """
  workers = min(plan.config.runner.workers, len(numbers))
  with Progress(_examples(plan, numbers), workers, unit="example") as progress:
    if workers > 1:
      _Crew(plan, numbers, progress).run(workers)
      return
    for number in numbers:
      progress.begin(0, number, plan.slice_of(number).count)
      export_shard(plan.config, number, functools.partial(progress.advance, 0))


def _examples(plan: ExportPlan, numbers: Sequence[int]) -> int | None:
  """How many examples these shards are made of; None when only reading the source tells."""
  total = 0
  for number in numbers:
    count = plan.slice_of(number).count
    if count is None:
      return None
    total += count
  return total


class _Crew:
  """Several workers and the shards that nobody has taken yet."""

  def __init__(self, plan: ExportPlan, numbers: Sequence[int], progress: Progress):
    self._plan, self._waiting, self._progress = plan, collections.deque(numbers), progress
    self._config = _pickled(plan.config)
    self._processes: dict[Connection, multiprocessing.Process] = {}
    self._worker: dict[Connection, int] = {}
    self._shard: dict[Connection, int] = {}  # the shard that a worker makes; a worker without work is not in it

  def run(self, workers: int) -> None:
    try:
      for worker in range(workers):
        self._start(worker)
      while self._shard:
        for connection in wait(list(self._shard)):
          self._listen(connection)
    finally:  # whatever happened: no process is left behind, and no file
      for process in self._processes.values():
        process.terminate()
      for process in self._processes.values():
        process.join()
      remove_abandoned(self._plan.directory)

  def _start(self, worker: int) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(worker, self._config, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of the pipe
    self._processes[here], self._worker[here] = process, worker
    self._assign(here)

  def _assign(self, connection: Connection) -> None:
    if not self._waiting:
      del self._shard[connection]
      return
    number = self._shard[connection] = self._waiting.popleft()
    self._progress.begin(self._worker[connection], number, self._plan.slice_of(number).count)
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
      case examples, skipped:
        self._progress.advance(self._worker[connection], examples, skipped)
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


def _pickled(config: ExportConfig) -> bytes:
  """The configuration as workers get it. Raises `UserError` for a class that no other process can import."""
  try:
    return pickle.dumps(config)
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    raise _not_importable(error) from None


def _not_importable(error: Exception) -> UserError:
  reason = " ".join(str(error).split())
  return UserError(f"workers cannot import a class of the configuration ({reason}): define it in a module beside the "
                   "configuration file and import it there, or set config.runner.workers=1")


def _work(worker: int, pickled: bytes, connection: Connection) -> None:
  """A worker's life: a shard number comes in; counts of examples go out, and at last "finished" or an error."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first process ends the others
  threading.Thread(target=_end_with_parent, daemon=True).start()
  try:
    config = pickle.loads(pickled)  # the parent process pickled it: nothing of it comes from a file
  except (ImportError, AttributeError) as error:
    connection.send(_not_importable(error))
    return
  _take_device(worker)

  def advance(examples: int, skipped: int) -> None:
    connection.send((examples, skipped))

  while True:
    number = connection.recv()
    try:
      export_shard(config, number, advance)
      connection.send("finished")
    except UserError as error:
      connection.send(UserError(str(error)))
    except Exception:  # the error itself may not survive the pipe
      connection.send(RuntimeError(f"worker {worker}, shard {number}:\n{traceback.format_exc()}"))


def _end_with_parent() -> None:
  """Ends this worker when the first process was killed, because nobody is left to tell it."""
  multiprocessing.parent_process().join()
  os._exit(1)


def _take_device(worker: int) -> None:
  """Makes one GPU this process's. A process that has not imported torch for its configuration needs no GPU."""
  torch = sys.modules.get("torch")
  if torch is not None and torch.cuda.is_available():
    torch.cuda.set_device(worker % torch.cuda.device_count())
