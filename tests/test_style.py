"""What keeps the code light to read: short files, functions and lines, few lambdas and comprehensions.

The limits per thousand lines of a package are half of the counts that the code once had: 12.6 lambdas, 43
comprehensions and generator expressions.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("refiner_export", "lyrics_jax")
FOLDERS = (*PACKAGES, "configs", "benchmarks", "tests")

FILE_LINES = 500
FUNCTION_LINES = 60
LAMBDAS = 6.3  # per thousand lines
COMPREHENSIONS = 21.5


def sources(folder: str) -> list[pathlib.Path]:
  return sorted((ROOT / folder).rglob("*.py"))


def count(trees, *kinds: type) -> int:
  return sum(isinstance(node, kinds) for tree in trees for node in ast.walk(tree))


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_are_short(folder):
  found = []
  for path in sources(folder):
    text, name = path.read_text(), path.relative_to(ROOT)
    lines = text.count("\n")
    if lines > FILE_LINES:
      found.append(f"{name}: {lines} lines")
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        length = node.end_lineno - node.lineno + 1
        if length > FUNCTION_LINES:
          found.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
  assert not found, "\n".join(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_lambdas_and_comprehensions_are_few(package):
  texts = [path.read_text() for path in sources(package)]
  thousands = sum(text.count("\n") for text in texts) / 1000
  trees = [ast.parse(text) for text in texts]
  lambdas = count(trees, ast.Lambda) / thousands
  comprehensions = count(trees, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp) / thousands
  assert lambdas <= LAMBDAS, f"{lambdas:.1f} lambdas per thousand lines"
  assert comprehensions <= COMPREHENSIONS, f"{comprehensions:.1f} comprehensions per thousand lines"


def test_ruff_finds_nothing():
  """Lines of 120 columns at most, no unused name: see pyproject.toml."""
  result = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format=concise", "."], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stdout + result.stderr


STAGE_NAMES = {"align", "instruct", "pretrain", "finetune"}


def test_nothing_forks_on_the_name_of_a_stage():
  """A stage is a value: no code asks which one it is. Earlier runs are read by their fields, in `weights`."""
  found = []
  for path in sources("lyrics_jax"):
    for node in ast.walk(ast.parse(path.read_text())):
      values = []
      if isinstance(node, ast.Compare):
        values = [node.left, *node.comparators]
      elif isinstance(node, ast.MatchValue):
        values = [node.value]
      for value in values:
        if isinstance(value, ast.Constant) and value.value in STAGE_NAMES:
          found.append(f"{path.relative_to(ROOT)}:{node.lineno}: compares with {value.value!r}")
  assert not found, "\n".join(found)
