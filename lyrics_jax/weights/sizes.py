"""What a Hugging Face directory's config.json says, held against our configuration: what no tensor's shape tells."""

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


def check_sizes(source: epath.Path, theirs: Mapping[str, Any], ours: Settings, where: str,
                names: Mapping[str, str]) -> None:
  """Requires that values agree which both name. `names`: our field -> their key; `where`: what `ours` is called."""
  for field, key in names.items():
    value = getattr(ours, field)
    require(theirs.get(key, value) == value, f"{source}: {key} is {theirs.get(key)}, {where}.{field}={value}; "
                                             f"set {where}.{field}={theirs.get(key)}")


def check_fixed(source: epath.Path, theirs: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
  """Requires that their settings are those which are the only ones here."""
  for key, value in needed.items():
    found = theirs.get(key, value)
    require(found == value, f"{source}: {key} is {found!r}, only {value!r} can be loaded here")
