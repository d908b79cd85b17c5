"""Refiners that do what a good one does not; in a file of their own, so that other processes can import them."""

import dataclasses
import os
import pathlib
import signal

from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.common.settings import UserError


@dataclasses.dataclass(unsafe_hash=True)
class LoggingRefiner(ClassicalRefiner):
  """Writes one line into `log` each time that it is built: its process."""
  log: str = ""

  def describe(self):
    return ClassicalRefiner(self.grid).describe()

  def build(self):
    with pathlib.Path(self.log).open("a") as file:
      file.write(f"{os.getpid()}\n")
    return ClassicalRefiner(self.grid)


@dataclasses.dataclass(unsafe_hash=True)
class UnbuildableRefiner(ClassicalRefiner):
  """`mistake` says whether it is the user's."""
  mistake: bool = True

  def build(self):
    raise UserError("weights not found") if self.mistake else ZeroDivisionError("a bug")


@dataclasses.dataclass(unsafe_hash=True)
class DyingRefiner(ClassicalRefiner):
  """Its process is killed as by a system that is out of memory, where the file `bomb` lies, which goes with it."""
  bomb: str = ""

  def describe(self):
    return ClassicalRefiner(self.grid).describe()

  def build(self):
    try:
      pathlib.Path(self.bomb).unlink()
    except FileNotFoundError:
      return ClassicalRefiner(self.grid)
    os.kill(os.getpid(), signal.SIGKILL)
