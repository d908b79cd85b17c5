"""Puts the weights of a checkpoint into a module, and matches the names that a table of names lists."""

import re
from collections.abc import Mapping, Sequence

import torch
from etils import epath

from refiner_export.common.settings import require


def fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], file: epath.PathLike, remedy: str) -> None:
  """Makes the tensors the module's weights, without a copy. Every name and shape must be accounted for.

  Args:
    module: may be on the device `meta`: then no time was spent on weights that are replaced at once.
    tensors: by the module's names.
    file: where the tensors come from, for the error.
    remedy: what to do about a file that does not fit, for the error.

  Raises:
    UserError: tensors are missing or unknown, or have another shape. The error names the first of them.
  """
  expected = module.state_dict()
  missing, unknown = [], []
  for name in expected:
    if name not in tensors:
      missing.append(name)
  for name in tensors:
    if name not in expected:
      unknown.append(name)
  require(not missing, f"{file} lacks {_first(missing)}. {remedy}")
  require(not unknown, f"{file} holds {_first(unknown)}, which this model does not have. {remedy}")
  for name, tensor in expected.items():
    found, shape = tuple(tensors[name].shape), tuple(tensor.shape)
    require(found == shape, f"{file}: {name} has the shape {found}, expected {shape}. {remedy}")
  module.load_state_dict(dict(tensors), assign=True)


def _first(names: Sequence[str]) -> str:
  """The first name, and how many more there are. An empty sequence gives an empty text."""
  if len(names) <= 1:
    return "".join(names)
  return f"{names[0]} and {len(names) - 1} more"


def prefix_pattern(prefix: str) -> re.Pattern:
  """A pattern for `fullmatch` that fits the names which begin with `prefix`, in whole parts such as `a.b` in `a.b.c`.

  `*` in the prefix stands for a number. The groups are the numbers, and last the rest of the name or None.
  """
  return re.compile(re.escape(prefix).replace(r"\*", r"(\d+)") + r"(\..+)?")


def insert_numbers(name: str, numbers: Sequence[str]) -> str:
  """The name with a number in place of each `*`."""
  for number in numbers:
    name = name.replace("*", number, 1)
  return name
