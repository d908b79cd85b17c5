"""Typed settings, shared by both packages: a tree of dataclasses derived from `Settings`.

A field whose annotation is a base class may hold any subclass. So a user adds a connector, an objective or a source by
writing a subclass, and no table of names has to know it. `to_json` writes the name of the subclass beside its fields,
and `from_dict` reads it back.

A mistake of a person is raised as `UserError`: a command prints it as one line and exits with code 2.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import json
import os
import pathlib
import sys
import types
import typing

import fsspec
import typeguard
from etils import epath

TYPE = "type"  # the entry of a JSON object that names its class, as "module:Class"
PACKAGES = ("lyrics_jax", "refiner_export")  # `from_dict` imports modules of these packages by itself
ROOT = pathlib.Path(__file__).parents[2]  # the folder that both packages lie in

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}  # what fsspec needs for a store
_SHOWN = 100  # characters of a wrong value in an error


class UserError(Exception):
  """A mistake that a person can mend. The message is one line: what is wrong, where, and what to do."""


def require(condition: bool, message: str) -> None:
  """Raises `UserError(message)` unless the condition holds."""
  if not condition:
    raise UserError(message)


def reachable(path: epath.PathLike) -> epath.Path:
  """The path, `~` expanded; it may not exist. Raises `UserError` for a store whose package is not installed."""
  scheme, is_remote, _ = os.fspath(path).partition("://")
  try:
    resolved = epath.Path(path).expanduser()
    if is_remote:
      fsspec.get_filesystem_class(scheme)
  except ImportError as error:
    remedy = f"pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else " ".join(str(error).split())
    raise UserError(f"{os.fspath(path)}: the package that opens {scheme}:// is missing: {remedy}") from None
  except (KeyError, ValueError):
    raise UserError(f"{os.fspath(path)}: {scheme}:// is unknown: name a folder, gs:// or s3://") from None
  return resolved


def existing_path(path: str, what: str, remedy: str) -> epath.Path:
  """The path. Raises `UserError` with the remedy when nothing is there."""
  resolved = reachable(path)
  require(resolved.exists(), f"{what} not found: {path}. {remedy}")
  return resolved


def existing_file(path: str, what: str, remedy: str) -> epath.Path:
  """The path of a file, `~` expanded. Raises `UserError` with the remedy when there is none, a folder or a pipe."""
  resolved = existing_path(path, what, remedy)
  require(not resolved.is_dir(), f"{what}: {path} is a folder. {remedy}")
  is_regular = "://" in os.fspath(resolved) or os.path.isfile(resolved)
  require(is_regular, f"{what}: {path} is no regular file. {remedy}")  # reading a pipe or a device may never end
  return resolved


@dataclasses.dataclass(unsafe_hash=True)
class Settings:
  """Base of all configuration dataclasses: assignable while flags are read, locked afterwards.

  A subclass is decorated with `@dataclasses.dataclass(unsafe_hash=True)`. A `ClassVar` is not a field. No field may be
  called `type`: JSON uses this name for the class.
  """

  def __setattr__(self, name, value):
    if self.__dict__.get("_final"):
      raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}: the configuration is already checked")
    super().__setattr__(name, value)

  def check(self, path: str) -> None:
    """Raises `UserError` for values that cannot go together. `path` is the dotted name of this object."""

  def finalize(self, path: str = "config") -> None:
    """Checks types and values of the whole tree, then forbids assignment. A second call changes nothing.

    Raises:
      UserError: names the field, such as `config.stage.objectives[0].weight`.
    """
    _check_class(type(self), path)
    for field in fields_of(type(self)):
      name = f"{path}.{field.name}"
      value = getattr(self, field.name)
      if not self.__dict__.get("_final"):
        value = _hashable(value)
        setattr(self, field.name, value)
      _check_type(value, field.type, name)
      _finalize_inside(value, name)
    self.check(path)
    self.__dict__["_final"] = True

  def unlocked(self) -> "Settings":
    """A copy of the whole tree that can be assigned to, whether this one is locked or not."""
    unlocked = copy.deepcopy(self)
    _unlock(unlocked)
    return unlocked

  def to_json(self) -> str:
    """JSON text that `from_dict` reads. Raises `UserError` for a class that could not be found again."""
    return json.dumps(_to_plain(self, type(self)), indent=2, sort_keys=True)


@functools.cache
def fields_of(kind: type) -> tuple[dataclasses.Field, ...]:
  """The fields of a settings class, each with its `type` as an object even where the source has it as a string."""
  fields = dataclasses.fields(kind)
  if any(isinstance(field.type, str) for field in fields):  # the module has `from __future__ import annotations`
    hints = typing.get_type_hints(kind)
    for field in fields:
      field.type = hints[field.name]
  return fields


def from_dict(kind: type, values: dict, path: str = "config") -> Settings:
  """Rebuilds a settings tree of class `kind` from the dictionary of `to_json`, checked and locked.

  Raises:
    UserError: an unknown or missing field, a wrong value, or a class whose module nobody has imported.
  """
  settings = _settings_from(kind, values, path)
  settings.finalize(path)
  return settings


def options_of(annotation) -> tuple:
  """The members of a union: `A | None` gives `(A, NoneType)`. Any other annotation is its only member."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return typing.get_args(annotation)
  return (annotation,)


def settings_classes(annotation) -> list[type]:
  """The settings classes that an annotation names outside of a tuple."""
  options = options_of(annotation)
  return [option for option in options if isinstance(option, type) and issubclass(option, Settings)]


def element_annotations(annotation, count: int) -> list:
  """One annotation for each element of a tuple of `count` elements; `object` where the annotation says nothing."""
  for option in options_of(annotation):
    if typing.get_origin(option) is tuple:
      arguments = typing.get_args(option)
      if len(arguments) == 2 and arguments[1] is Ellipsis:
        return [arguments[0]] * count
      if len(arguments) == count:
        return list(arguments)
  return [object] * count


def suggestion(name: str, known) -> str:
  """` (did you mean NAME?)`, or the list of known names when none is close."""
  known = list(known)
  close = difflib.get_close_matches(name, known, n=1)
  if close:
    return f" (did you mean {close[0]}?)"
  return f" (known: {', '.join(known) or 'none'})"


# --- checks ---


def _check_class(kind: type, path: str) -> None:
  """Finds the two mistakes that are easily made when a settings class is written."""
  remedy = f"write @dataclasses.dataclass(unsafe_hash=True) above class {kind.__name__}"
  names = {field.name for field in fields_of(kind)}
  for name, annotation in kind.__dict__.get("__annotations__", {}).items():
    is_class_variable = "ClassVar" in str(annotation)
    require(is_class_variable or name in names, f"{path}: {kind.__name__}.{name} is not a field: {remedy}")
  require(TYPE not in names, f"{path}: {kind.__name__}.{TYPE}: a field may not have this name: rename it")
  require(kind.__hash__ is not None, f"{path}: {kind.__name__} is not hashable: {remedy}")


def _check_type(value, annotation, name: str) -> None:
  elements = element_annotations(annotation, len(value)) if isinstance(value, tuple) else []
  for index, element in enumerate(elements):
    _check_type(value[index], element, f"{name}[{index}]")
  try:
    typeguard.check_type(value, annotation, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
  except typeguard.TypeCheckError:
    got = type(value).__name__
    if not isinstance(value, Settings):
      got = f"{_shortened(repr(value))} ({got})"
    raise UserError(f"{name}: expected {_annotation_name(annotation)}, got {got}") from None


def _finalize_inside(value, name: str) -> None:
  if isinstance(value, Settings):
    value.finalize(name)
  elif isinstance(value, tuple):
    for index, element in enumerate(value):
      _finalize_inside(element, f"{name}[{index}]")


def _unlock(value) -> None:
  if isinstance(value, Settings):
    value.__dict__.pop("_final", None)
    for field in fields_of(type(value)):
      _unlock(getattr(value, field.name))
  elif isinstance(value, (tuple, list)):
    for element in value:
      _unlock(element)


def _hashable(value):
  """Lists become tuples: a list in a configuration file is easily written and cannot be hashed."""
  if isinstance(value, (list, tuple)):
    return tuple(_hashable(element) for element in value)
  return value


def _annotation_name(annotation) -> str:
  if isinstance(annotation, type) and not typing.get_args(annotation):
    return annotation.__name__
  origin = typing.get_origin(annotation)
  if origin in (typing.Union, types.UnionType):
    return " | ".join(map(_annotation_name, typing.get_args(annotation)))
  if origin is tuple:
    return f"tuple[{', '.join(map(_annotation_name, typing.get_args(annotation)))}]"
  return "..." if annotation is Ellipsis else str(annotation).removeprefix("typing.")


def _shortened(text: str) -> str:
  return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


# --- to and from plain values ---


def _to_plain(value, annotation):
  """What JSON can hold. A settings object names its class unless the annotation leaves no other choice."""
  if isinstance(value, Settings):
    plain = {}
    for field in fields_of(type(value)):
      plain[field.name] = _to_plain(getattr(value, field.name), field.type)
    if settings_classes(annotation) != [type(value)]:
      plain[TYPE] = _class_name(type(value))
    return plain
  if isinstance(value, (tuple, list)):
    annotations = element_annotations(annotation, len(value))
    return [_to_plain(element, kind) for element, kind in zip(value, annotations)]
  return value


def _from_plain(annotation, value, path: str):
  if isinstance(value, dict):
    classes = settings_classes(annotation)
    if TYPE in value or classes:
      return _settings_from(_class_of(classes, value, path), value, path)
  if isinstance(value, list):
    elements = []
    for index, kind in enumerate(element_annotations(annotation, len(value))):
      elements.append(_from_plain(kind, value[index], f"{path}[{index}]"))
    return tuple(elements)
  return value


def _settings_from(kind: type, values: dict, path: str) -> Settings:
  known = {field.name: field for field in fields_of(kind)}
  built = {}
  for name, value in values.items():
    if name == TYPE:
      continue
    require(name in known, f"{path}.{name}: unknown field{suggestion(name, known)}")
    built[name] = _from_plain(known[name].type, value, f"{path}.{name}")
  for name, field in known.items():
    has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
    require(name in built or has_default or not field.init, f"{path}.{name} is missing: {kind.__name__} needs it")
  return kind(**built)


def _class_of(classes: list[type], values: dict, path: str) -> type:
  """The class that the values name, or the only one that the annotation allows."""
  expected = " or ".join(kind.__name__ for kind in classes) or "no settings"
  if TYPE not in values:
    require(len(classes) == 1, f"{path}: no {TYPE!r} entry says which class it is: expected {expected}")
    return classes[0]
  kind = _find_class(str(values[TYPE]), path)
  fits = any(issubclass(kind, allowed) for allowed in classes)
  require(fits, f"{path}: expected {expected}, got {values[TYPE]}")
  return kind


def _find_class(name: str, path: str) -> type:
  """The settings class of this name. Imports modules of the two packages, and nothing else."""
  module, _, qualified = name.partition(":")
  if module not in sys.modules:
    is_ours = module.partition(".")[0] in PACKAGES
    require(is_ours, f"{path}: its class {name} is not known here: add --with={module} to the command, "
                     "and start it where this module can be imported")
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      raise UserError(f"{path}: its class {name} cannot be imported: {error}") from error
  found = sys.modules[module]
  for part in qualified.split("."):
    found = getattr(found, part, None)
  is_settings = isinstance(found, type) and issubclass(found, Settings)
  require(is_settings, f"{path}: there is no settings class {name}")
  return found


def _class_name(kind: type) -> str:
  findable = "<locals>" not in kind.__qualname__
  require(findable, f"{kind.__qualname__} is defined inside a function, where it cannot be found again: "
                    "define it at the top of a module")
  return f"{kind.__module__}:{kind.__qualname__}"
