"""A configuration file: a Python file whose `get_config()` returns settings, and fields that the command line changes.

  --config configs/x.py --config.optimizer.peak_lr=3e-4 --config.stage.objectives[0].weight=2

`ml_collections.config_flags` sets the fields. This module loads the file and checks the names first, so that a mistake
is one line that names a file and a line, or a field.
"""

import importlib
import importlib.util
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Literal

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from refiner_export.common.settings import (
    PACKAGES, ROOT, Settings, UserError, element_annotations, fields_of, options_of, require, settings_classes,
    suggestion)

FLAG = "config"

_GET_CONFIG = "get_config"
_OVERRIDE = re.compile(rf"--?(?:no)?{FLAG}\.([^=]+)")
_PRIVATE = "_config_file_"  # begins the module name of a file whose stem is taken
_INSTALL = ("put the module beside this file, or install the extra that has it, such as "
            "pip install 'lyrics_jax[refiner]'")


def define(kind: type[Settings], argv: Sequence[str], flag_values: flags.FlagValues) -> None:
  """Defines `--config` among these flags. Its value is a `kind` that is not yet finalized.

  Args:
    kind: the class that `get_config()` has to return.
    argv: the command line, which says which fields become flags.
    flag_values: gets the flag.
  """
  config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())  # `finalize` checks the word
  config_flags.DEFINE_config_file(FLAG, flag_values=flag_values, sys_argv=list(argv))
  flag_values[FLAG].parser = _Parser(kind, argv)


class _Parser(flags.ArgumentParser):
  """Reads the file when absl reaches the flag `--config`."""

  def __init__(self, kind: type[Settings], argv: Sequence[str]):
    self._kind, self._argv = kind, argv

  def flag_type(self) -> str:
    return "configuration file"

  def parse(self, path: str) -> Settings:
    settings = load(path, self._kind)
    names = []
    for argument in self._argv:
      if found := _OVERRIDE.match(argument):
        names.append(found[1])
    for name in names:
      _check_override(settings, name, names)
    return settings


def load(path: str, kind: type[Settings]) -> Settings:
  """What `get_config()` of a file returns. The folder of the file can be imported from, as for a script.

  The file becomes a module under its own name, so that a worker process finds the classes that it defines.

  Raises:
    UserError: names file and line of the error.
  """
  file = pathlib.Path(path)
  require(file.is_file(), f"--{FLAG}: no such file: {path}")
  require(file.suffix == ".py", f"--{FLAG}={path}: expected a Python file, such as configs/quickstart_align.py")
  try:
    module = import_file(path)
  except Exception as error:
    raise UserError(_located(error, path, 1)) from error
  require(hasattr(module, _GET_CONFIG), f"{path}, line 1: there is no function {_GET_CONFIG}() in this file")
  line = getattr(getattr(module.get_config, "__code__", None), "co_firstlineno", 1)
  try:
    settings = module.get_config()
  except Exception as error:
    raise UserError(_located(error, path, line)) from error
  require(isinstance(settings, kind),
          f"{path}, line {line}: {_GET_CONFIG}() returned {with_article(type(settings).__name__)}, "
          f"expected {with_article(kind.__name__)}")
  if module.__name__.startswith(_PRIVATE):
    _check_classes(settings, module.__name__, path)
  return settings.unlocked()  # the file may return a saved configuration, or share parts with another one


def import_file(path: str) -> types.ModuleType:
  """Imports a file under the name of its stem, and puts its folder on `sys.path`, which worker processes inherit.

  The folder comes last, so that a file called `json.py` does not hide a library from the workers.
  """
  file = pathlib.Path(path).resolve()
  if str(file.parent) not in sys.path:
    sys.path.append(str(file.parent))
  importlib.invalidate_caches()
  name = file.stem
  loaded = sys.modules.get(name)
  if loaded is not None and _is_file(getattr(loaded, "__file__", None), file):
    return loaded
  if "." in name or loaded is not None or not _is_file(importlib.util.find_spec(name).origin, file):
    name = _PRIVATE + name  # its stem means another module
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def import_module(name: str) -> None:
  """Imports what `--with` names: a module, or a Python file. Raises `UserError`."""
  try:
    if name.endswith(".py"):
      require(os.path.isfile(name), f"no such file: {name}")
      import_file(name)
    else:
      importlib.import_module(name)
  except Exception as error:
    raise UserError(f"--with={name}: {_located(error, name, None)}") from error


def _is_file(origin: str | None, file: pathlib.Path) -> bool:
  return origin is not None and pathlib.Path(origin).resolve() == file


def _check_classes(settings: Settings, module: str, path: str) -> None:
  """Refuses classes of a file that no other process can import."""
  kind = type(settings)
  require(kind.__module__ != module,
          f"{path}: class {kind.__name__} could not be found by worker processes, because another module has the name "
          "of this file: put the class in a module beside the file, or rename the file")
  for field in fields_of(kind):
    value = getattr(settings, field.name)
    for element in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(element, Settings):
        _check_classes(element, module, path)


# --- errors of the file ---


def _located(error: Exception, path: str, line: int | None) -> str:
  """One line: file, line number, and what is wrong there. `line` is that of the file where the error names none."""
  text = " ".join(str(error).split())
  if isinstance(error, SyntaxError) and error.filename:
    return f"{_shown(error.filename, path)}, line {error.lineno}: {error.msg}"
  if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in PACKAGES:
    text = f"{text}: {_INSTALL}"
  elif not isinstance(error, UserError):
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
  folder = pathlib.Path(path).resolve().parent
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    if not frame.filename.startswith("<") and pathlib.Path(frame.filename).resolve().parent == folder:
      return f"{_shown(frame.filename, path)}, line {frame.lineno}: {text}"
  return text if line is None else f"{path}, line {line}: {text}"


def _shown(filename: str, path: str) -> str:
  """The name as the person wrote it, or relative to the working directory where it is below that."""
  file = pathlib.Path(filename).resolve()
  if file == pathlib.Path(path).resolve():
    return path
  here = pathlib.Path.cwd()
  return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def with_article(noun: str) -> str:
  """`a Config`, `an ExportConfig`."""
  return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


# --- fields on the command line ---


def _check_override(settings: Settings, name: str, names: Sequence[str]) -> None:
  """Raises `UserError` unless `--config.NAME` can be set. `names` are all that the command line sets."""
  try:
    parts = config_path.split(name)
  except ValueError:
    raise UserError(f"--{FLAG}.{name}: expected names of fields and numbers, such as "
                    f"--{FLAG}.stage.objectives[0].weight") from None
  node, annotation, seen = settings, type(settings), FLAG
  for part in parts:
    if node is None:
      node = _built(annotation, seen, names)
    if isinstance(part, str):
      known = {field.name: field for field in fields_of(type(node))} if isinstance(node, Settings) else {}
      seen = f"{seen}.{part}"
      require(part in known, f"{seen}: unknown field{suggestion(part, known)}")
      node, annotation = getattr(node, part), known[part].type
      whole = seen
    else:
      require(isinstance(node, (tuple, list)) and isinstance(part, int), f"{seen}[{part}]: {seen} has no parts")
      require(0 <= part < len(node), f"{seen}[{part}]: {seen} has {len(node)} parts, which are counted from 0")
      annotation = element_annotations(annotation, len(node))[part]
      node, seen = node[part], f"{seen}[{part}]"
  if seen == whole:
    _check_settable(annotation, seen)
  else:  # it ends with a number
    require(isinstance(node, Settings), f"{seen}: write the whole, such as --{whole}=\"(1, 2)\"")
    raise UserError(f"{seen}: name a field of it, such as --{seen}.{fields_of(type(node))[0].name}=VALUE")


def _built(annotation, seen: str, names: Sequence[str]) -> Settings:
  """What `--config.FIELD=build` puts where there was None."""
  classes = settings_classes(annotation)
  is_built = seen.removeprefix(f"{FLAG}.") in names
  require(len(classes) == 1 and is_built, f"{seen} is None: write --{seen}=build before its fields")
  return classes[0]()


def _check_settable(annotation, seen: str) -> None:
  classes = settings_classes(annotation)
  is_optional = types.NoneType in options_of(annotation)
  elements = settings_classes(element_annotations(annotation, 1)[0])
  require(not elements and (not classes or is_optional and len(classes) == 1),
          f"{seen}: choose it in the configuration file; the command line sets its fields, such as --{seen}"
          f"{'[0]' if elements else ''}.FIELD=VALUE")


def source_of(kind: type) -> str:
  """Where a person reads the fields of a settings class: its file, relative to the folder of the packages."""
  file = pathlib.Path(sys.modules[kind.__module__].__file__).resolve()
  return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)
