"""Typed settings from a Python file and the command line, shared by every entry point of both packages.

A configuration is a tree of dataclasses derived from `Settings`. A file `configs/x.py` has a function `get_config()`
that returns one; `--config configs/x.py --config.optimizer.peak_lr=3e-4` loads it and overrides a field
(`ml_collections.config_flags`). Whatever a person got wrong is raised as `UserError`: `run` prints it as one line and
exits with code 2, without a traceback.
"""

import dataclasses
import difflib
import json
import os
import runpy
import sys
from collections.abc import Callable
from typing import Literal

import typeguard
from absl import app, flags
from etils import epath
from ml_collections import config_flags


class UserError(Exception):
  """Something a person can mend: what is wrong, where, and what to do, in one line."""


@dataclasses.dataclass(unsafe_hash=True)
class Settings:
  """Base of all configuration dataclasses: assignable while flags are read, locked afterwards."""

  def __setattr__(self, name, value):
    if self.__dict__.get("_final"):
      raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}: the configuration is already checked")
    super().__setattr__(name, value)

  def check(self, path: str) -> None:
    """Raises `UserError` for values that cannot go together. `path` is the dotted name of this object."""

  def finalize(self, path: str = "config") -> None:
    """Checks types and values of the whole tree, then forbids assignment. Idempotent."""
    for field in dataclasses.fields(self):
      value, name = getattr(self, field.name), f"{path}.{field.name}"
      if isinstance(value, list):  # a list written in a config file would not be hashable
        value = tuple(value)
        if not self.__dict__.get("_final"):
          setattr(self, field.name, value)
      try:
        typeguard.check_type(value, field.type)
      except typeguard.TypeCheckError:
        expected = getattr(field.type, "__name__", str(field.type)) if isinstance(field.type, type) else field.type
        raise UserError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})") from None
      if isinstance(value, Settings):
        value.finalize(name)
    self.check(path)
    self.__dict__["_final"] = True

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)


def require(condition: bool, message: str) -> None:
  """Raises `UserError(message)` unless the condition holds."""
  if not condition:
    raise UserError(message)


def from_dict(kind: type, values: dict, path: str = "config"):
  """Rebuilds a settings tree of class `kind` from `to_json`'s dictionary, checked and locked."""
  known = {f.name: f for f in dataclasses.fields(kind)}
  for name in values:
    require(name in known, f"{path}.{name}: unknown field{_suggestion(name, known)}")
  built = {}
  for name, value in values.items():
    field_type = known[name].type
    if isinstance(value, dict) and isinstance(field_type, type) and issubclass(field_type, Settings):
      value = from_dict(field_type, value, f"{path}.{name}")
    elif isinstance(value, list):
      value = tuple(value)
    built[name] = value
  settings = kind(**built)
  settings.finalize(path)
  return settings


def define(kind: type) -> flags.FlagHolder:
  """Defines the flag `--config`; its value is a locked `kind` once `run` has parsed the command line."""
  config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())  # `finalize` checks the word
  holder = config_flags.DEFINE_config_file("config", help_string=f"Python file whose get_config() returns a {kind.__name__}.")
  holder.settings_type = kind
  return holder


def run(main: Callable[[], None], config: flags.FlagHolder | None = None) -> None:
  """Parses the command line, locks the configuration and calls `main()`; a `UserError` becomes one line and exit code 2."""

  def parse(argv):
    path = _config_path(argv)
    try:
      require(path is None or os.path.isfile(path), f"--config: no such file: {path}")
      rest = flags.FLAGS(argv)
      require(len(rest) == 1, f"unexpected argument {rest[-1]!r}: options are written --name=value")
      return rest
    except UserError as error:
      _fail(error)
    except ModuleNotFoundError as error:  # a configuration may use what an extra brings, such as torch
      _fail(f"{path}: {error}: install the extra that has it, such as pip install 'lyrics_jax[refiner]'")
    except (KeyError, AttributeError, flags.Error, ValueError, TypeError, OSError) as error:
      _fail(_unknown_field(argv, path) or _one_line(error))

  def guarded(_):
    try:
      if config is not None:
        require(config.value is not None, "--config is required, for example --config configs/quickstart_align.py")
        require(isinstance(config.value, config.settings_type),
                f"--config: get_config() returned {type(config.value).__name__}, expected {config.settings_type.__name__}")
        config.value.finalize()
      main()
    except UserError as error:
      _fail(error)

  app.run(guarded, flags_parser=parse)


def _fail(error) -> None:
  print(f"error: {error}", file=sys.stderr, flush=True)
  sys.exit(2)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__


def _config_path(argv: list[str]) -> str | None:
  for argument, following in zip(argv[1:], [*argv[2:], None]):
    name, _, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name == "config":
      return value or following
  return None


def _unknown_field(argv: list[str], path: str | None) -> str | None:
  """The line for a misspelt `--config.a.b=...`, which config_flags reports as a bare KeyError."""
  if path is None:
    return None
  settings = runpy.run_path(path)["get_config"]()
  for argument in argv[1:]:
    name = argument.lstrip("-").split("=")[0]
    if not name.startswith("config."):
      continue
    node, seen = settings, "config"
    for part in name.split(".")[1:]:
      known = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
      if part not in known:
        return f"{seen}.{part}: unknown field{_suggestion(part, known)}"
      node, seen = getattr(node, part), f"{seen}.{part}"
  return None


def _suggestion(name: str, known) -> str:
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known) or 'none'})"


def existing_path(path: str, what: str, remedy: str) -> epath.Path:
  """The path, or a `UserError` naming what is missing and how to make it."""
  resolved = epath.Path(path)
  require(resolved.exists(), f"{what} not found: {path}. {remedy}")
  return resolved
