"""Compares the config.json of a Hugging Face directory with our settings: shapes of tensors do not tell everything."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from refiner_export.common.settings import Settings, UserError, require


def read_settings(directory: epath.Path) -> dict[str, Any]:
  """`config.json` in the directory, or beside the file; empty where there is none. Raises `UserError` when damaged."""
  file = (directory if directory.is_dir() else directory.parent) / "config.json"
  if not file.exists():
    return {}
  try:
    values = json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f"{file} is not JSON ({' '.join(str(error).split())}). Download or save it again") from None
  require(isinstance(values, dict), f"{file} is not a configuration. Download or save it again")
  return values


def check_sizes(path: epath.Path, published: Mapping[str, Any], settings: Settings, where: str,
                names: Mapping[str, str]) -> None:
  """Requires that the published sizes are those of our settings. A size that is not published is not compared.

  Args:
    path: of the weights, for messages.
    published: values of a config.json.
    settings: of the part of our model.
    where: the dotted name of `settings`.
    names: our field -> key of the published value.
  """
  for field, key in names.items():
    value = getattr(settings, field)
    found = published.get(key, value)
    require(found == value,
            f"{path}: {key} is {found}, {where}.{field}={value}; set {where}.{field}={found}")


def check_fixed(path: epath.Path, published: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
  """Requires that published values, where there are any, are the only ones that our model can have."""
  for key, value in needed.items():
    found = published.get(key, value)
    require(found == value, f"{path}: {key} is {found!r}, only {value!r} can be loaded here")
