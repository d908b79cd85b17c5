"""An end within seconds of SIGINT or SIGTERM, whatever a thread is doing.

Python calls a signal's handler in the main thread, between two steps of the interpreter. A main thread that waits for a
network drive or computes for long gets there late. So a second thread hears of the signal too. It ends the process when
the main thread has not done so in good time.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import NoReturn

GRACE = 4.0  # seconds that the main thread has to end in good order
STOPPED = "stopped; what is finished is kept, and the same command goes on from there"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen() -> None:
  """From now on both signals raise `KeyboardInterrupt` with their number in the main thread, or end the process."""
  heard, told = os.pipe()
  os.set_blocking(told, False)
  signal.set_wakeup_fd(told, warn_on_full_buffer=False)
  for number in _SIGNALS:
    signal.signal(number, _interrupt)
  threading.Thread(target=_end_late, args=(heard,), daemon=True, name="stopping").start()


def leave(code: int, line: str) -> NoReturn:
  """Prints a line and ends the process at once. The usual end would wait for threads that read, perhaps for ever."""
  for stream in sys.stdout, sys.stderr:
    stream.flush()
  _end(code, line)


def _end(code: int, line: str) -> NoReturn:
  os.write(sys.stderr.fileno(), f"{line}\n".encode())  # the main thread may hold the lock of the stream for ever
  os._exit(code)


def _interrupt(number: int, _) -> NoReturn:
  raise KeyboardInterrupt(signal.Signals(number))


def _end_late(heard: int) -> None:
  number = 0
  while number not in _SIGNALS:
    number = os.read(heard, 1)[0]
  time.sleep(GRACE)
  for process in multiprocessing.active_children():
    process.kill()
  _end(128 + number, STOPPED)
