"""python killer.py HOW CONFIG FOLDER: exports in child processes that are killed, again and again, and go on.

A child is forked after the imports, because the imports take most of the time. HOW is

  moments     one export into FOLDER/reference is not disturbed. Exports into FOLDER/0, FOLDER/1, ... are killed at
              random moments, at least 20 times in all.
  operations  the export into FOLDER/K is killed just before operation K on its files, and then goes on undisturbed. The
              last export has fewer than K operations and is not killed.

The last line of the output says how many exports were killed.
"""

import functools
import os
import pathlib
import random
import runpy
import signal
import sys
import time
import traceback

from refiner_export.export.run import export

KILLS = 20  # at least
_OPERATIONS = "os.rename", "os.remove", "os.mkdir"


def start(path, output, before=None) -> int:
  """Forks a child that calls `before` and exports. Returns its process id."""
  child = os.fork()
  if child:
    return child
  code = 1
  try:
    config = runpy.run_path(path)["get_config"]()
    config.output = str(output)
    config.finalize()
    if before:
      before()
    export(config)
    code = 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    os._exit(code)


def was_killed(child: int) -> bool:
  """Waits for the end of a child. A child that failed by itself ends the whole program."""
  _, status = os.waitpid(child, 0)
  if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
    sys.exit("an export failed")
  return os.WIFSIGNALED(status)


def at_moments(path, folder) -> int:
  begun = time.monotonic()
  was_killed(start(path, folder / "reference"))
  undisturbed = time.monotonic() - begun
  generator, kills, exports = random.Random(0), 0, 0
  while kills < KILLS:
    killed = True
    while killed:
      child = start(path, folder / str(exports))
      # The pause grows, because looking at finished shards takes time too, and a machine may become slower.
      time.sleep(generator.uniform(0, undisturbed / 15 * (1 + kills / KILLS)))
      os.kill(child, signal.SIGKILL)
      killed = was_killed(child)
      kills += killed
    exports += 1
  return kills


def at_operations(path, folder) -> int:
  for kills in range(1000):
    if not was_killed(start(path, folder / str(kills), functools.partial(kill_before, kills, folder))):
      return kills
    was_killed(start(path, folder / str(kills)))


def kill_before(operation: int, folder: pathlib.Path) -> None:
  """Kills this process once so many files in the folder were opened for writing, renamed, made or removed."""
  left = operation

  def hook(event, arguments):
    nonlocal left
    writes = event in _OPERATIONS or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if writes and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(str(folder)):
      if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
      left -= 1

  sys.addaudithook(hook)


if __name__ == "__main__":
  how, config, folder = sys.argv[1:]
  print({"moments": at_moments, "operations": at_operations}[how](config, pathlib.Path(folder)))
