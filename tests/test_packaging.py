"""What each side needs to be installed: a machine that exports has no JAX, one that trains has no PyTorch."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorstore", "tensorboard", "tensorboardX")
PYTORCH = ("torch", "torchvision")

NEEDS_PYTORCH = ("lyrics_jax.torch_model", "lyrics_jax.weights")  # and nothing else of lyrics_jax
COMMANDS = ("train", "plan", "evaluate", "generate", "retrieve", "attention", "convert", "data.train_tokenizers")
BEAM = ("refiner_export.export.beam_pipeline",)  # needs Apache Beam, which the tests do not install
AUTHORS = ("refiner_export.refiners.originals",)  # needs packages of the authors, see constraints-original.txt

# Hidden libraries look as if nobody had installed them: other libraries that ask for them get the answer None.
HIDE = """
import importlib, sys

class Without:
  def __init__(self, finder):
    self.finder = finder

  def find_spec(self, name, path=None, target=None):
    return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)

  def __getattr__(self, name):
    return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for module in {modules!r}:
  importlib.import_module(module)
"""


def modules_of(package: str, leave_out: tuple[str, ...] = ()) -> list[str]:
  found = []
  for path in sorted((ROOT / package).rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if not name.startswith(leave_out):
      found.append(name)
  return found


def import_without(hidden: tuple[str, ...], modules: list[str]) -> None:
  code = HIDE.format(hidden=hidden, modules=modules)
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr


def test_exporting_needs_no_jax():
  import_without((*JAX, "lyrics_jax"), modules_of("refiner_export", (*BEAM, *AUTHORS)))


def test_exporting_with_the_classical_refiner_needs_no_pytorch_either():
  networks = tuple(f"refiner_export.refiners.{name}" for name in (
      "neural", "ram_plus", "grounding_dino", "sam_hq", "checkpoints", "compute"))
  import_without((*JAX, *PYTORCH, "transformers", "lyrics_jax"),
                 modules_of("refiner_export", (*BEAM, *AUTHORS, *networks)))


def test_training_needs_no_pytorch():
  import_without(PYTORCH, modules_of("lyrics_jax", NEEDS_PYTORCH) + [f"lyrics_jax.{name}" for name in COMMANDS])


# --- what setup.py lists ---


def requirements() -> tuple[list[str], dict[str, list[str]]]:
  """The base and the extras of setup.py."""
  listed = {}
  for node in ast.parse((ROOT / "setup.py").read_text()).body:
    if isinstance(node, ast.Assign):
      exec(compile(ast.Module([node], []), "setup.py", "exec"), listed)  # plain lists
  return listed["BASE"], listed["EXTRAS"]


def distribution(requirement: str) -> str:
  return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def libraries(package: str, leave_out: tuple[str, ...] = ()) -> set[str]:
  """Distributions of all that a package imports, inside functions too; what nobody installed is left out."""
  distributions = importlib.metadata.packages_distributions()
  found = set()
  for module in modules_of(package, leave_out):
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      for name in names:
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("lyrics_jax", "refiner_export"):
          found |= {distribution(name) for name in distributions.get(top, ())}
  return found


# These come with tensorflow-datasets and grain where they exist.
TRANSITIVE = {"array-record"}


@pytest.mark.parametrize("package, extras, leave_out", [
    ("refiner_export", ["refiner", "beam"], AUTHORS),
    ("lyrics_jax", ["train"], NEEDS_PYTORCH),
    ("lyrics_jax", ["hf"], ()),
])
def test_every_library_that_is_imported_is_listed(package, extras, leave_out):
  base, listed = requirements()
  available = {distribution(requirement) for requirement in base} | TRANSITIVE
  for extra in extras:
    available |= {distribution(requirement) for requirement in listed[extra]}
  missing = libraries(package, leave_out) - available
  assert not missing


def test_the_base_belongs_to_no_side():
  base, extras = requirements()
  names = {distribution(requirement) for requirement in base}
  sides = {"jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "torch", "torchvision", "transformers"}
  assert not names & sides
  assert set(extras) == {"train", "tpu", "cuda", "refiner", "plan", "hf", "eval", "beam", "quickstart", "dev"}
  for extra in ("train", "tpu", "cuda", "plan", "eval", "quickstart"):
    assert "torch" not in {distribution(requirement) for requirement in extras[extra]}, extra
  for extra in ("refiner", "beam"):
    assert not {distribution(requirement) for requirement in extras[extra]} & (sides - {"torch", "transformers"}), extra


def test_what_the_tests_install_is_pinned():
  pins = {}
  for line in (ROOT / "constraints.txt").read_text().splitlines():
    if "==" in line and not line.startswith("#"):
      name, _, version = line.partition("==")
      pins[distribution(name)] = version
  base, extras = requirements()
  for requirement in [*base, *extras["dev"], *extras["quickstart"], *extras["eval"], *extras["beam"]]:
    assert distribution(requirement) in pins, requirement


def test_the_documented_commands_are_there():
  """README: two commands; pyproject: lines of 120 columns."""
  makefile = (ROOT / "Makefile").read_text()
  for target in ("quickstart", "test", "lint"):
    assert f"\n{target}: " in makefile
  assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["line-length"] == 120


def test_every_data_file_is_packaged():
  setup = (ROOT / "setup.py").read_text()
  patterns = ast.literal_eval(re.search(r"package_data=(\{.*?\})", setup, flags=re.DOTALL)[1])
  for package in ("refiner_export", "lyrics_jax"):
    for path in (ROOT / package).rglob("*"):
      inside = path.relative_to(ROOT / package)
      if path.is_file() and path.suffix not in (".py", ".pyc"):
        assert any(inside.match(pattern) for pattern in patterns[package]), path
