"""Commands: help, flags, configuration files with errors, classes of a user; and every command of both packages."""

import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

TOY = '''"""A toy: prints what it was asked.

It has one flag of each kind.
"""
import dataclasses, json, multiprocessing, sys
from refiner_export.common.command import Command, Flag, Positional
from refiner_export.common.settings import Settings, UserError, from_dict, require

@dataclasses.dataclass(unsafe_hash=True)
class Part(Settings):
  weight: float = 1.0

@dataclasses.dataclass(unsafe_hash=True)
class Wide(Part):
  width: int = 3

@dataclasses.dataclass(unsafe_hash=True)
class Stage(Settings):
  objectives: tuple[Part, ...] = ()
  optional: Wide | None = None
  part: Part = dataclasses.field(default_factory=Part)

@dataclasses.dataclass(unsafe_hash=True)
class Config(Settings):
  steps: int = 10
  scale: tuple[float, float] = (0.5, 1.0)
  names: tuple[str, ...] = ()
  flip: bool = True
  stage: Stage = dataclasses.field(default_factory=Stage)

  def check(self, path):
    require(self.steps > 0, f"{path}.steps={self.steps} must be positive")

def show(config, text, times, names, loud, mode):
  print(text, times, names, loud, mode)
  print(config)

def in_worker(config):
  print("worker:", config)

def work(config, saved):
  if saved:
    config = from_dict(Config, json.load(open(saved)))
  process = multiprocessing.get_context("spawn").Process(target=in_worker, args=(config,))
  process.start()
  process.join()
  print(config.to_json())
  return process.exitcode

SHOW = Command(
    name="toy", about=__doc__, main=show, config=Config, examples=("python -m toy --config x.py",),
    flags=(Flag("text", "what to say", metavar="WORDS"), Flag("times", "how often", default=2, at_least=1),
           Flag("names", "of whom", default=()), Flag("loud", "whether to shout", default=False),
           Flag("mode", "in which way", default="plain", choices=("plain", "odd"))))
WORK = Command(name="toy_work", about="Works.", main=work, config=Config,
               examples=("python -m toy_work --config x.py",), flags=(Flag("saved", "a saved configuration"),))
'''
RUN = "import toy\nif __name__ == '__main__':\n  toy.{}.run()\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("commands")
  (path / "toy.py").write_text(TOY)
  (path / "show.py").write_text(RUN.format("SHOW"))
  (path / "work.py").write_text(RUN.format("WORK"))
  write(path, "good.py", "from toy import Config, Part, Stage, Wide",
        "def get_config():", "  return Config(stage=Stage([Part(), Wide(), Part()]))")
  return path


def write(folder: pathlib.Path, name: str, *lines: str) -> None:
  path = folder / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("\n".join(lines) + "\n")


def run(folder: pathlib.Path, *arguments) -> subprocess.CompletedProcess:
  line = [sys.executable, "-m", *map(str, arguments)]
  return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)


def mistake(result: subprocess.CompletedProcess) -> str:
  assert result.returncode == 2 and result.stdout == "", result.stdout + result.stderr
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
  return result.stderr.removeprefix("error: ").removesuffix("\n")


def test_flags_and_fields(folder):
  result = run(folder, "show", "--config", "good.py", "--text=x y", "--times", "3", "--names=a", "--names", "b",
               "--loud", "--mode=odd", "--config.steps=5", "--config.stage.objectives[0].weight=2",
               "--config.stage.objectives[1].width=7", "--config.scale=(0.1, 0.2)", "--noconfig.flip",
               "--config.names=a", "--config.names=b", "--config.stage.optional=build",
               "--config.stage.optional.width=9")
  assert result.returncode == 0, result.stderr
  said, config = result.stdout.splitlines()
  assert said == "x y 3 ('a', 'b') True odd"
  assert config == ("Config(steps=5, scale=(0.1, 0.2), names=('a', 'b'), flip=False, stage=Stage(objectives=("
                    "Part(weight=2.0), Wide(weight=1.0, width=7), Part(weight=1.0)), "
                    "optional=Wide(weight=1.0, width=9), part=Part(weight=1.0)))")


def test_defaults_of_flags(folder):
  result = run(folder, "show", "--config=good.py")
  assert result.stdout.startswith("None 2 () False plain\nConfig(steps=10, "), result.stderr


def test_help(folder):
  for arguments in (["--help"], ["-h"], ["--config", "nothing.py", "--times=x", "--help"]):
    result = run(folder, "show", *arguments)
    assert result.returncode == 0 and result.stderr == ""
  assert result.stdout.startswith("A toy: prints what it was asked.\n\nIt has one flag of each kind.\n\n"
                                  "usage: python -m toy --config FILE [--config.FIELD=VALUE ...] [flags]\n\n")
  for line in ("--config FILE ", f"all fields: {folder / 'toy.py'}", "--text WORDS", "how often (default: 2)",
               "of whom (may be repeated)", "--mode plain|odd", "--loud  ", "--with MODULE",
               "\nexample:\n  python -m toy --config x.py\n"):
    assert "".join(line.split()) in "".join(result.stdout.split()), line


@pytest.mark.parametrize("arguments, message", [
    ([], "--config is required, for example: python -m toy --config x.py"),
    (["--config.steps=3"], "--config is required, for example: python -m toy --config x.py"),
    (["--config", "nothing.py"], "--config: no such file: nothing.py"),
    (["--config"], "Missing value for flag --config"),
    (["--config=toy"], "--config: no such file: toy"),
    (["--config=good.py", "--tims=3"], "unknown flag --tims (did you mean --times?)"),
    (["--config=good.py", "--zzz=3"], "unknown flag --zzz: see python -m toy --help"),
    (["--config=good.py", "--times=0"], "flag --times=0: 0 is not a positive integer"),
    (["--config=good.py", "--times=no"], "flag --times=no: invalid literal for int() with base 10: 'no'"),
    (["--config=good.py", "--mode=even"], "flag --mode=even: value should be one of <plain|odd>"),
    (["--config=good.py", "word"], "unexpected argument 'word': flags are written --name=value"),
    (["--config=good.py", "--with=nothing_here"],
     "--with=nothing_here: No module named 'nothing_here': put the module beside this file, or install the extra that "
     "has it, such as pip install 'lyrics_jax[refiner]'"),
    (["--config=good.py", "--with=nothing.py"], "--with=nothing.py: no such file: nothing.py"),
    (["--config=good.py", "--config.step=3"], "config.step: unknown field (did you mean steps?)"),
    (["--config=good.py", "--config.steps=many"],
     "flag --config.steps=many: invalid literal for int() with base 10: 'many'"),
    (["--config=good.py", "--config.steps=0"], "config.steps=0 must be positive"),
    (["--config.steps=3", "--config=good.py"],
     "Found --config.steps=3 in argv before a value for --config was specified"),
    (["--config=good.py", "--config.stage.objectives[0].wieght=2"],
     "config.stage.objectives[0].wieght: unknown field (did you mean weight?)"),
    (["--config=good.py", "--config.stage.objectives[0].width=2"],
     "config.stage.objectives[0].width: unknown field (known: weight)"),
    (["--config=good.py", "--config.stage.objectives[3].weight=2"],
     "config.stage.objectives[3]: config.stage.objectives has 3 parts, which are counted from 0"),
    (["--config=good.py", "--config.stage.objectives[0]=2"],
     "config.stage.objectives[0]: name a field of it, such as --config.stage.objectives[0].weight=VALUE"),
    (["--config=good.py", "--config.stage.objectives=2"],
     "config.stage.objectives: choose it in the configuration file; the command line sets its fields, such as "
     "--config.stage.objectives[0].FIELD=VALUE"),
    (["--config=good.py", "--config.stage.part=build"],
     "config.stage.part: choose it in the configuration file; the command line sets its fields, such as "
     "--config.stage.part.FIELD=VALUE"),
    (["--config=good.py", "--config.stage.optional.width=2"],
     "config.stage.optional is None: write --config.stage.optional=build before its fields"),
    (["--config=good.py", "--config.stage.optional=build", "--config.stage.optional.size=2"],
     "config.stage.optional.size: unknown field (known: weight, width)"),
    (["--config=good.py", "--config.steps[0]=2"], "config.steps[0]: config.steps has no parts"),
    (["--config=good.py", "--config.scale[0]=2"],
     "config.scale[0]: write the whole, such as --config.scale=\"(1, 2)\""),
    (["--config=good.py", "--config.scale=(1, 2, 3)"],
     "config.scale: expected tuple[float, float], got (1, 2, 3) (tuple)"),
    (["--config=good.py", "--config.a-b=2"],
     "--config.a-b: expected names of fields and numbers, such as --config.stage.objectives[0].weight"),
])
def test_mistakes(folder, arguments, message):
  assert mistake(run(folder, "show", *arguments)) == message


@pytest.mark.parametrize("lines, message", [
    (["import toy", "def get_config(:", "  pass"], "bad.py, line 2: invalid syntax"),
    (["import toy", "", "def get_config():", "return toy.Config()"],
     "bad.py, line 4: expected an indented block after function definition on line 3"),
    (["", "import beside_broken", "def get_config(): pass"], "beside_broken.py, line 1: '(' was never closed"),
    (["import nothing_here"],
     "bad.py, line 1: No module named 'nothing_here': put the module beside this file, or install the extra that has "
     "it, such as pip install 'lyrics_jax[refiner]'"),
    (["def get_config():", "  import nothing_here"],
     "bad.py, line 2: No module named 'nothing_here': put the module beside this file, or install the extra that has "
     "it, such as pip install 'lyrics_jax[refiner]'"),
    (["from toy import Nothing"],
     "bad.py, line 1: ImportError: cannot import name 'Nothing' from 'toy' (/toy.py)"),
    (["from refiner_export import nothing"], "bad.py, line 1: ImportError: cannot import name 'nothing' from "
                                             "'refiner_export' (/refiner_export/__init__.py)"),
    (["import refiner_export.nothing"],
     "bad.py, line 1: ModuleNotFoundError: No module named 'refiner_export.nothing'"),
    (["import toy", "def get_config():", "  return toy.Config(stepps=3)"],
     "bad.py, line 3: TypeError: Config.__init__() got an unexpected keyword argument 'stepps'"),
    (["import toy", "def get_config():", "  return toy.Config(stage=1 / 0)"],
     "bad.py, line 3: ZeroDivisionError: division by zero"),
    (["import beside", "def get_config():", "  return beside.make()"], "beside.py, line 2: AssertionError"),
    (["from toy import UserError", "def get_config():", "  raise UserError('set the variable DATA')"],
     "bad.py, line 3: set the variable DATA"),
    (["import toy", "config = toy.Config()"], "bad.py, line 1: there is no function get_config() in this file"),
    (["import toy", "", "def get_config():", "  toy.Config()"],
     "bad.py, line 3: get_config() returned a NoneType, expected a Config"),
    (["def get_config():", "  return {'steps': 3}"], "bad.py, line 1: get_config() returned a dict, expected a Config"),
    (["def get_config(size):", "  return size"],
     "bad.py, line 1: TypeError: get_config() missing 1 required positional argument: 'size'"),
    (["import toy", "def get_config():", "  return toy.Config(steps='ten')"],
     "config.steps: expected int, got 'ten' (str)"),
    (["import toy", "def get_config():", "  return toy.Config(stage=toy.Stage((toy.Part(), toy.Stage())))"],
     "config.stage.objectives[1]: expected Part, got Stage"),
])
def test_a_configuration_file_with_an_error(folder, lines, message):
  write(folder, "beside.py", "def make():", "  assert False")
  write(folder, "beside_broken.py", "value = (1,")
  write(folder, "bad.py", *lines)
  found = mistake(run(folder, "show", "--config", "bad.py"))
  assert found.replace(str(folder), "").replace(str(ROOT), "") == message


OWN_CLASS = ("import dataclasses", "import toy", "from parts_beside import Beside",
             "@dataclasses.dataclass(unsafe_hash=True)", "class Mine(toy.Part):", "  depth: int = 4",
             "def get_config():", "  return toy.Config(stage=toy.Stage((Mine(), Beside())))")
BESIDE = ("import dataclasses", "import toy", "@dataclasses.dataclass(unsafe_hash=True)", "class Beside(toy.Part):",
          "  height: int = 5")


def test_classes_of_a_user_reach_worker_processes_and_are_read_back(folder, tmp_path):
  (folder / "mine").mkdir(exist_ok=True)
  write(folder, "mine/own-file.py", *OWN_CLASS)
  write(folder, "mine/parts_beside.py", *BESIDE)
  result = run(folder, "work", "--config", "mine/own-file.py", "--config.stage.objectives[0].depth=6")
  assert result.returncode == 0, result.stderr
  worker, _, saved = result.stdout.partition("\n")
  assert "Mine(weight=1.0, depth=6), Beside(weight=1.0, height=5)" in worker
  assert '"type": "own-file:Mine"' in saved and '"type": "parts_beside:Beside"' in saved

  (tmp_path / "saved.json").write_text(saved)
  again = ["work", "--config=good.py", f"--saved={tmp_path / 'saved.json'}"]
  assert mistake(run(folder, *again)) == (
      "config.stage.objectives[0]: its class own-file:Mine is not known here: add --with=own-file to the command, and "
      "start it where this module can be imported")
  result = run(folder, *again, "--with=mine/own-file.py")
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith("worker: ") and result.stdout.endswith(saved)


def test_a_file_whose_name_is_taken_may_not_define_classes(folder):
  (folder / "taken").mkdir(exist_ok=True)
  write(folder, "taken/json.py", *(line.replace("parts_beside", "taken_beside") for line in OWN_CLASS))
  write(folder, "taken/taken_beside.py", *BESIDE)
  assert mistake(run(folder, "work", "--config", "taken/json.py")) == (
      "taken/json.py: class Mine could not be found by worker processes, because another module has the name of this "
      "file: put the class in a module beside the file, or rename the file")
  write(folder, "taken/json.py", "import toy", "from taken_beside import Beside", "def get_config():",
        "  return toy.Config(stage=toy.Stage([Beside()]))")
  result = run(folder, "work", "--config", "taken/json.py")
  assert result.returncode == 0 and "Beside(weight=1.0, height=5)" in result.stdout, result.stderr


def test_a_configuration_file_may_return_a_saved_configuration(folder):
  write(folder, "saved.py", "import json", "from toy import Config",
        "from refiner_export.common.settings import from_dict", "def get_config():", "  config = Config(steps=7)",
        "  config.finalize()", "  return from_dict(Config, json.loads(config.to_json()))")
  result = run(folder, "show", "--config", "saved.py", "--config.stage.part.weight=3")
  assert result.returncode == 0, result.stderr
  assert "Config(steps=7, " in result.stdout and "part=Part(weight=3.0)" in result.stdout


# --- every command of both packages ---

COMMANDS = {  # what follows `python -m` -> a line of its help, and what is said when nothing follows
    "refiner_export export": ("--shard-range START:STOP",
                              "--config is required, for example: python -m refiner_export --config "),
    "refiner_export verify": ("--threads N", "DIR is required: a directory that python -m refiner_export wrote"),
    "refiner_export repair": ("--threads N", "--config is required, for example: python -m refiner_export repair "),
    "refiner_export gallery": ("--limit N", "DIR is required: a directory that python -m refiner_export wrote"),
    "refiner_export beam": ("--beam-pipeline-options NAME=VALUE,...", "--config is required"),
    "lyrics_jax.train": ("--hosts", "--config is required, for example: python -m lyrics_jax.train --config "),
    "lyrics_jax.plan": ("--topology CHIP:SHAPE", "--config is required"),
    "lyrics_jax.convert from-hf": ("--llama PATH", "--config is required"),
    "lyrics_jax.convert to-hf": ("--lora merge|adapter", "--checkpoint is required: output directory of a run"),
    "lyrics_jax.convert check": ("--hf DIR", "--checkpoint is required: output directory of a run"),
    "lyrics_jax.generate": ("--prompt TEXT", "--checkpoint is required: output directory of a run"),
    "lyrics_jax.evaluate": ("--records DIR", "--checkpoint is required: output directory of a run"),
    "lyrics_jax.retrieve": ("--rerank N", "--checkpoint is required: output directory of a run"),
    "lyrics_jax.attention": ("--output FILE.png", "--checkpoint is required: output directory of a run"),
    "lyrics_jax.study": ("--preset slice|small|full", "--preset is required: how large"),
    "lyrics_jax.data.train_tokenizers": ("--records DIR", "--records is required: directory of records"),
}
SEVERAL = {"refiner_export": ("export", "verify", "repair", "gallery", "beam"),
           "lyrics_jax.convert": ("from-hf", "to-hf", "check")}


def command_of(name: str):
  """The object behind `python -m NAME`."""
  module, _, word = name.partition(" ")
  if module in ("refiner_export", "lyrics_jax.study"):
    module = f"{module}.__main__"
  loaded = importlib.import_module(module)
  return loaded.COMMANDS.commands[word] if word else loaded.COMMAND


def test_the_table_has_every_command():
  found = set()
  for package in ("refiner_export", "lyrics_jax"):
    for path in (ROOT / package).rglob("*.py"):
      found |= set(re.findall(r"= Command\(.*?name=\"([^\"]+)\"", path.read_text(), flags=re.DOTALL))
  assert found == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_mistakes_of_every_command(name, capsys):
  flag, missing = COMMANDS[name]
  command = command_of(name)
  with pytest.raises(SystemExit) as stopped:
    command.run(["--help"])
  said = capsys.readouterr()
  assert stopped.value.code == 0 and said.err == ""
  assert f"usage: python -m {name}" in said.out and flag in said.out and "\n  --with MODULE" in said.out
  assert re.search(r"\n\nexamples?:\n  python -m ", said.out)
  assert len(command.about.split()) > 5
  parameters = inspect.signature(command.main).parameters
  keywords = {given.keyword for given in command.flags} | {given.name for given in command.positional}
  keywords |= {"config"} if command.config else set()
  if "paths" not in parameters:  # `from-hf` has a flag for each kind of weights
    assert keywords == set(parameters)
  for example in command.examples:
    assert example.startswith(f"python -m {name.replace(' export', '')} ")

  for arguments, words in (([], missing), (["--nothing-like-it=3"], "")):
    with pytest.raises(SystemExit) as stopped:
      command.run(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.startswith(f"error: {words}") and said.err.count("\n") == 1


@pytest.mark.parametrize("name", SEVERAL)
def test_several_commands_under_one_name(name, capsys):
  words = SEVERAL[name]
  module = "refiner_export.__main__" if name == "refiner_export" else name
  commands = importlib.import_module(module).COMMANDS
  with pytest.raises(SystemExit) as stopped:
    commands.run(["--help"])
  said = capsys.readouterr().out
  assert stopped.value.code == 0 and f"usage: python -m {name} {'|'.join(words)} [flags]\n" in said
  assert all(f"\n  {word} " in said for word in words) and re.search(r"\nexamples:\n  python -m ", said)
  with pytest.raises(SystemExit) as stopped:
    commands.run(["other"])
  assert stopped.value.code == 2
  assert capsys.readouterr().err == (f"error: expected one of {', '.join(words)}, got 'other': see python -m {name} "
                                     "--help\n")


def test_the_examples_name_flags_and_files_that_exist():
  for name in COMMANDS:
    command = command_of(name)
    known = {given.name for given in command.flags} | {"config"}
    for example in command.examples:
      for flag in re.findall(r" --([a-z][a-z0-9-]*)", example.replace("_", "-")):
        assert flag in known, f"{example}: --{flag}"
      for file in re.findall(r"--config (\S+)", example):
        assert (ROOT / file).is_file(), f"{example}: {file}"
