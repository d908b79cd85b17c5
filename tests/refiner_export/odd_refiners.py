"""Refiners that fail, die or write logs. They have a separate file, so that other processes can import them."""

import dataclasses
import os
import pathlib
import signal

from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.common.settings import UserError


@dataclasses.dataclass(unsafe_hash=True)
class LoggingRefiner(ClassicalRefiner):
  """Writes the number of its process into `log` each time that it is built."""
  log: str = ""

  def describe(self):
    return ClassicalRefiner(self.grid).describe()

  def build(self):
    with pathlib.Path(self.log).open("a") as file:
      file.write(f"{os.getpid()}\n")
    return ClassicalRefiner(self.grid)


@dataclasses.dataclass(unsafe_hash=True)
class UnbuildableRefiner(ClassicalRefiner):
  """Cannot be built. `mistake` says whether this is a mistake of the user, or a bug."""
  mistake: bool = True

  def build(self):
    raise UserError("weights not found") if self.mistake else ZeroDivisionError("a bug")


@dataclasses.dataclass(unsafe_hash=True)
class DyingRefiner(ClassicalRefiner):
  """Removes the file `bomb` if it exists, and kills its process as a system without memory would do."""
  bomb: str = ""

  def describe(self):
    return ClassicalRefiner(self.grid).describe()

  def build(self):
    try:
      pathlib.Path(self.bomb).unlink()
    except FileNotFoundError:
      return ClassicalRefiner(self.grid)
    os.kill(os.getpid(), signal.SIGKILL)
