"""The one way to make a command: `python -m NAME --flag VALUE`, with the same help, errors and exit codes everywhere.

A module declares a `Command`, and runs it under `if __name__ == "__main__"`. Importing the module defines no flag.
Exit code 0 means success and 2 a mistake of the person, told in one line that begins with `error:`.
"""

import dataclasses
import difflib
import faulthandler
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags

from refiner_export.common import config_file, logs
from refiner_export.common.settings import Settings, UserError, require

_WIDTH = 100  # columns of the help
MISTAKE = 2  # exit codes
_INTERRUPTED = 130
_PARSING_ERRORS = (absl_flags.Error, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError)


@dataclasses.dataclass(frozen=True)
class Flag:
  """One flag of a command.

  Attributes:
    name: as it is written, with dashes. `main` gets the keyword with underscores.
    help: what it means, without a full stop.
    default: decides the type of the value: text, whole number, or bool for a switch. None means a text that may be left
      out. A tuple lets the flag be repeated; its values are texts.
    metavar: what stands for the value in the help.
    required: whether the command fails without it.
    choices: the texts that are allowed; all where empty.
    at_least: the lowest number that is allowed.
  """
  name: str
  help: str
  default: Any = None
  metavar: str = ""
  required: bool = False
  choices: tuple[str, ...] = ()
  at_least: int | None = None

  def __post_init__(self):
    if "_" in self.name:
      raise ValueError(f"flag {self.name!r}: write its name with dashes")

  @property
  def keyword(self) -> str:
    return self.name.replace("-", "_")

  @property
  def is_switch(self) -> bool:
    return isinstance(self.default, bool)

  @property
  def is_number(self) -> bool:
    return isinstance(self.default, int) and not self.is_switch

  def define(self, flag_values: absl_flags.FlagValues) -> None:
    """Adds the flag to absl's."""
    options = {"name": self.name, "help": self.help, "flag_values": flag_values}
    if isinstance(self.default, tuple):
      absl_flags.DEFINE_multi_string(default=list(self.default), **options)
    elif self.choices:
      absl_flags.DEFINE_enum(default=self.default, enum_values=list(self.choices), **options)
    elif self.is_switch:
      absl_flags.DEFINE_bool(default=self.default, **options)
    elif self.is_number:
      absl_flags.DEFINE_integer(default=self.default, lower_bound=self.at_least, **options)
    else:
      absl_flags.DEFINE_string(default=self.default, **options)

  def described(self) -> tuple[str, str]:
    """How it is written, and its help with what else is known of it."""
    written = f"--{self.name}"
    if not self.is_switch:
      written += f" {'|'.join(self.choices) or self.metavar or ('N' if self.is_number else 'TEXT')}"
    notes = []
    if self.required:
      notes.append("required")
    elif isinstance(self.default, tuple):
      notes.append("may be repeated")
    elif self.default not in (None, "") and not self.is_switch:
      notes.append(f"default: {self.default}")
    return written, self.help + (f" ({', '.join(notes)})" if notes else "")


@dataclasses.dataclass(frozen=True)
class Positional:
  """An argument that is known by its place. `main` gets it as keyword `name`; the help shows `metavar`."""
  name: str
  metavar: str
  help: str


_WITH = Flag("with", "a module or .py file with classes of yours, imported before saved settings are read", default=(),
             metavar="MODULE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """A command.

  Attributes:
    name: what follows `python -m`.
    about: what it does, usually the docstring of its module. The first paragraph stands in a list of commands.
    main: gets a keyword for each flag and positional argument, and `config` where there is one. A number that it
      returns is the exit code.
    config: the settings class of `--config`; None where the command takes no configuration file.
    flags: its flags, in the order of the help.
    positional: its positional arguments, all required.
    examples: whole command lines.
  """
  name: str
  about: str
  main: Callable[..., Any]
  examples: tuple[str, ...]
  config: type[Settings] | None = None
  flags: tuple[Flag, ...] = ()
  positional: tuple[Positional, ...] = ()

  def run(self, arguments: Sequence[str] | None = None) -> NoReturn:
    """Reads the command line, calls `main`, and exits."""
    if arguments is None:
      arguments = sys.argv[1:]
      faulthandler.enable()
    if _asks_for_help(arguments):
      print(self.help(), flush=True)
      sys.exit(0)
    try:
      values = self.parse(arguments)
      logs.setup()
      code = self.main(**values)
      sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
      fail(error)
    except KeyboardInterrupt:
      print("stopped", file=sys.stderr, flush=True)
      sys.exit(_INTERRUPTED)

  def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
    """The keywords of `main`, with a configuration that is checked and locked. Raises `UserError`."""
    arguments = [_with_dashes(argument) for argument in arguments]
    argv = [self.name, *arguments]
    flag_values = absl_flags.FlagValues()
    flag_values.set_gnu_getopt(True)  # flags may follow positional arguments
    for flag in (*self.flags, _WITH):
      flag.define(flag_values)
    if self.config is not None:
      config_file.define(self.config, argv, flag_values)
    try:
      rest = flag_values(argv)[1:]
    except absl_flags.UnrecognizedFlagError as error:
      self._check_config_given(arguments)
      raise UserError(f"unknown flag --{error.flagname}{self._suggestion(error.flagname)}") from None
    except _PARSING_ERRORS as error:
      raise UserError(" ".join(str(error).split()) or type(error).__name__) from error
    absl_flags.FLAGS([self.name])  # libraries may ask for their own flags

    for module in flag_values["with"].value:
      config_file.import_module(module)
    values = {}
    if self.config is not None:
      self._check_config_given(arguments)
      values[config_file.FLAG] = flag_values[config_file.FLAG].value
      values[config_file.FLAG].finalize()
    return values | self._positional_values(rest) | self._flag_values(flag_values)

  def help(self) -> str:
    """What it does, how it is called, every flag, and examples."""
    usage = " ".join([f"python -m {self.name}", *(argument.metavar for argument in self.positional)])
    rows = [(argument.metavar, argument.help) for argument in self.positional]
    if self.config is not None:
      kind, source = config_file.with_article(self.config.__name__), config_file.source_of(self.config)
      usage += " --config FILE [--config.FIELD=VALUE ...]"
      rows.append(("--config FILE", f"Python file whose get_config() returns {kind} (required)"))
      rows.append(("--config.FIELD=VALUE",
                   f"changes a field of it, such as --config.a.b=3 or --config.a[0].b=3; all fields: {source}"))
    for flag in self.flags:
      if flag.required:
        usage += f" {flag.described()[0]}"
    rows.extend(flag.described() for flag in self.flags)
    rows += [_WITH.described(), ("--help", "this text")]
    parts = [self.about.strip(), f"usage: {usage} [flags]", _table(rows)]
    parts.append("\n".join(["example:" if len(self.examples) == 1 else "examples:", *_indented(self.examples)]))
    return "\n\n".join(parts)

  def _check_config_given(self, arguments: Sequence[str]) -> None:
    given = any(argument == "--config" or argument.startswith("--config=") for argument in arguments)
    require(given or self.config is None, f"--config is required, for example: {self.examples[0]}")

  def _suggestion(self, name: str) -> str:
    known = [flag.name for flag in (*self.flags, _WITH)]
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean --{close[0]}?)" if close else f": see python -m {self.name} --help"

  def _positional_values(self, rest: Sequence[str]) -> dict[str, str]:
    for argument in self.positional[len(rest):]:
      raise UserError(f"{argument.metavar} is required: {argument.help}, for example: {self.examples[0]}")
    for argument in rest[len(self.positional):]:
      raise UserError(f"unexpected argument {argument!r}: flags are written --name=value")
    return dict(zip((argument.name for argument in self.positional), rest))

  def _flag_values(self, flag_values: absl_flags.FlagValues) -> dict[str, Any]:
    values = {}
    for flag in self.flags:
      value = flag_values[flag.name].value
      require(not flag.required or value not in (None, "", []), f"--{flag.name} is required: {flag.help}")
      values[flag.keyword] = tuple(value) if isinstance(value, list) else value
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commands:
  """Several commands under one name: `python -m NAME WORD ...`.

  Attributes:
    name: what follows `python -m`.
    about: what they are for.
    commands: by the word that chooses one.
    default: the word that may be left out; empty where none may.
  """
  name: str
  about: str
  commands: Mapping[str, Command]
  default: str = ""

  def run(self, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command that the first word names, and exits."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    word, has_word = self.default, bool(arguments) and not arguments[0].startswith("-")
    if has_word:
      word, arguments = arguments[0], arguments[1:]
    elif _asks_for_help(arguments):
      print(self.help(), flush=True)
      sys.exit(0)
    if word not in self.commands:
      fail(f"expected one of {', '.join(self.commands)}, got {word!r}: see python -m {self.name} --help")
    self.commands[word].run(arguments)

  def help(self) -> str:
    """The list of commands, and the whole help of the one whose word may be left out."""
    rows = []
    for word, command in self.commands.items():
      rows.append((word, " ".join(command.about.strip().partition("\n\n")[0].split())))
    parts = [self.about.strip(), f"usage: python -m {self.name} {'|'.join(self.commands)} [flags]", _table(rows)]
    parts.append(f"python -m {self.name} COMMAND --help shows the flags of a command.")
    if self.default:
      parts.append(f"{self.default} may be left out:\n\n{self.commands[self.default].help()}")
    else:
      examples = [command.examples[0] for command in self.commands.values()]
      parts.append("\n".join(["examples:", *_indented(examples)]))
    return "\n\n".join(parts)


def fail(error: UserError | str) -> NoReturn:
  """Prints the one line of a mistake, and exits with code 2."""
  print(f"error: {error}", file=sys.stderr, flush=True)
  sys.exit(MISTAKE)


def _asks_for_help(arguments: Sequence[str]) -> bool:
  return any(argument in ("--help", "-help", "-h") for argument in arguments)


def _with_dashes(argument: str) -> str:
  """`--shard_range=1:2` means `--shard-range=1:2`. Names of configuration fields keep their underscores."""
  name, equals, value = argument.partition("=")
  is_flag = name.startswith("--") and not name.startswith(("--config.", "--noconfig."))
  return (name.replace("_", "-") if is_flag else name) + equals + value


def _indented(lines: Sequence[str]) -> list[str]:
  return [f"  {line}" for line in lines]


def _table(rows: Sequence[tuple[str, str]]) -> str:
  """Two columns: what is written, and what it means."""
  left = min(30, max(len(name) for name, _ in rows)) + 2
  lines = []
  for name, text in rows:
    wrapped = textwrap.wrap(text, _WIDTH - left - 2, break_long_words=False, break_on_hyphens=False) or [""]
    if len(name) + 2 > left:
      lines.append(f"  {name}")
      name = ""
    lines.append(f"  {name:{left}}{wrapped[0]}".rstrip())
    lines += [f"  {'':{left}}{line}" for line in wrapped[1:]]
  return "\n".join(lines)
