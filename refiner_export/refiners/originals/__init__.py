"""The refiner's three networks as their authors' packages run them, in place of this project's own.

Pictures, captions, thresholds, labels and features are the same code as with the networks of `refiner_export.refiners`;
tests hold both to the same results. The packages need an environment of their own: see constraints-original.txt.
"""

import importlib
import importlib.metadata
import types

from refiner_export.refiners.compute import Compute
from refiner_export.common.settings import UserError, require


def load_package(module: str, who: str, install: str) -> types.ModuleType:
  """The module of a package that people install themselves.

  Args:
    module: dotted name.
    who: needs it, for the error: a field of the configuration or a class.
    install: how to get it, for the error.

  Raises:
    UserError: it is not installed, or cannot be imported beside what else is.
  """
  try:
    return importlib.import_module(module)
  except (ImportError, OSError, RuntimeError) as error:  # the last is what a torchvision for another torch raises
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"{who} needs the package {module}, which cannot be imported here ({reason}). {install}") from None


def distribution_version(distribution: str) -> str:
  """The installed version, which decides the result; `unknown` for a package that runs from a folder of its source."""
  try:
    return importlib.metadata.version(distribution)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def require_uncompiled(compute: Compute) -> None:
  """Raises `UserError` when the device's settings ask for torch.compile, which these packages were not written for."""
  require(not compute.compile, "compute.compile=True: the authors' packages run uncompiled: set compute.compile=False")
