"""`python -m lyrics_jax.convert` as a user runs it: messages and exit codes. A mistake leaves nothing behind."""

import os
import pathlib
import subprocess
import sys

import pytest
from safetensors.numpy import load_file, save_file
from saved_run import make_run_config, save_run

from lyrics_jax.weights.to_hf import export

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = """
import json
from lyrics_jax.config import Config
from refiner_export.common.settings import from_dict


def get_config():
  config = from_dict(Config, json.load(open({saved!r})))
  config.__dict__.pop("_final")
  return config
"""


@pytest.fixture(scope="module")
def directory(tokenizer_directory, tmp_path_factory) -> pathlib.Path:
  """A run of stage 1 and its configuration, the directory made of it, one cut short and one that lacks a tensor."""
  directory = tmp_path_factory.mktemp("commands")
  config = make_run_config("align", directory / "run", tokenizer_directory)
  save_run(config)
  (directory / "config.py").write_text(CONFIG.format(saved=str(directory / "run" / "config.json")))
  for name in ("hf", "cut", "incomplete"):
    export(config.output, str(directory / name))
  weights = directory / "cut" / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-20])
  tensors = load_file(directory / "incomplete" / "model.safetensors")
  del tensors["mq_former.queries"]
  save_file(tensors, directory / "incomplete" / "model.safetensors", {"format": "pt"})
  return directory


COMMANDS = {  # name -> arguments, and what the one line of an error says
    "to-hf": ("to-hf --checkpoint=run --output=made", ""),
    "check": ("check --checkpoint=run --hf=hf", ""),
    "output exists": ("to-hf --checkpoint=run --output=hf", "hf already exists: remove it, or name another directory"),
    "a truncated file": ("from-hf --config=config.py --lyrics=cut --output=start", "is not a whole .safetensors file"),
    "a missing tensor": ("check --checkpoint=run --hf=incomplete", "tensor mq_former.queries is missing (1 in all)"),
}


@pytest.fixture(scope="module")
def done(directory) -> dict[str, subprocess.CompletedProcess]:
  """The commands, all at once: most of their time they import. And what the directory held before."""
  before = sorted(os.listdir(directory))
  environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
  started = {name: subprocess.Popen([sys.executable, "-m", "lyrics_jax.convert", *line.split()], cwd=directory,
                                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
             for name, (line, _) in COMMANDS.items()}
  said = {name: process.communicate(timeout=300) for name, process in started.items()}
  assert sorted(os.listdir(directory)) == sorted([*before, "made"])  # of the others not even what is temporary
  return {name: subprocess.CompletedProcess(process.args, process.returncode, *said[name])
          for name, process in started.items()}


def test_to_hf(done, directory):
  assert done["to-hf"].returncode == 0, done["to-hf"].stderr
  assert done["to-hf"].stderr.splitlines()[-1].endswith(" written: made, step 7 of run")
  made, expected = (load_file(directory / name / "model.safetensors") for name in ("made", "hf"))
  assert made.keys() == expected.keys() and all((made[name] == value).all() for name, value in expected.items())


def test_check(done):
  assert done["check"].returncode == 0, done["check"].stderr
  header, *lines = (line.split() for line in done["check"].stdout.splitlines())
  assert header == ["part", "largest", "difference", "largest", "value"]
  assert [line[0] for line in lines] == ["vision", "mq-former", "itc", "itm", "icg", "msp"]
  assert all(float(difference) < 1e-4 for _, difference, _ in lines)  # float32 sums in another order


@pytest.mark.parametrize("mistake", [name for name, (_, words) in COMMANDS.items() if words])
def test_a_mistake_is_one_line(done, mistake):
  _, words = COMMANDS[mistake]
  assert done[mistake].returncode == 2 and "Traceback" not in done[mistake].stderr, done[mistake].stderr
  said = [line for line in done[mistake].stderr.splitlines() if line.startswith("error: ")]
  assert len(said) == 1 and words in said[0] and done[mistake].stderr.endswith(f"{said[0]}\n"), done[mistake].stderr
  assert done[mistake].stdout == ""
