"""The three networks of the neural refiner, run by their authors' packages instead of this project's code.

Pictures, captions, thresholds, labels and features are made by the same code as with this project's networks. Tests
compare the results of both. The packages need a separate environment: see constraints-original.txt.
"""

import importlib
import importlib.metadata
import types

from refiner_export.common.settings import UserError, require
from refiner_export.refiners.compute import Compute


def load_package(module: str, who: str, install: str) -> types.ModuleType:
  """The module of a package that is no dependency of this project.

  Args:
    module: dotted name.
    who: a field of the configuration or a class that needs the module, for the error.
    install: how to get the package, for the error.

  Raises:
    UserError: the package is not installed, or cannot be imported beside the installed versions of other packages.
  """
  try:
    return importlib.import_module(module)
  except (ImportError, OSError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"{who} needs the package {module}, which cannot be imported here ({reason}). {install}") from None


def distribution_version(distribution: str) -> str:
  """The installed version of a package. `unknown` when the package is imported from a folder of its source code."""
  try:
    return importlib.metadata.version(distribution)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def require_uncompiled(compute: Compute) -> None:
  """Raises `UserError` when the settings ask for torch.compile, because these packages were not written for it."""
  require(not compute.compile, "compute.compile=True: the authors' packages run uncompiled: set compute.compile=False")
