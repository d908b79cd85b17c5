"""Which room may look into which. Imports are read from the source, those inside functions too; nothing is imported.

A room is a folder, or a file that stands for itself. `ORDER` lists the rooms of each package from the bottom up. A room
may import from itself and from rooms of earlier rows; rooms of one row do not know each other.
"""

import ast
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]

ORDER = [
    # --- what both packages stand on ---
    ["refiner_export/common"],
    ["refiner_export/records"],
    ["refiner_export/pages"],
    # --- PyTorch: pictures and text become records ---
    ["refiner_export/sources"],
    ["refiner_export/refiners"],
    ["refiner_export/refiners/classical", "refiner_export/refiners/ram_plus", "refiner_export/refiners/grounding_dino",
     "refiner_export/refiners/sam_hq"],
    ["refiner_export/refiners/originals"],
    ["refiner_export/refiners/neural.py"],
    ["refiner_export/export"],
    ["refiner_export/__main__.py"],
    # --- JAX: records become a model ---
    ["lyrics_jax/torch_model"],
    ["lyrics_jax/sharding.py", "lyrics_jax/data/batch.py"],
    ["lyrics_jax/models/layers"],
    ["lyrics_jax/models/visibility.py"],
    ["lyrics_jax/models/inputs.py"],
    ["lyrics_jax/models/vision", "lyrics_jax/models/llm"],
    ["lyrics_jax/models/connectors"],
    ["lyrics_jax/models"],
    ["lyrics_jax/models/aligner.py", "lyrics_jax/models/vlm.py"],
    ["lyrics_jax/tasks"],
    ["lyrics_jax/data"],
    ["lyrics_jax/objectives"],
    ["lyrics_jax/stage.py", "lyrics_jax/training/optimizer.py", "lyrics_jax/training/evaluations.py"],
    ["lyrics_jax/config.py"],
    ["lyrics_jax/training"],
    ["lyrics_jax/inference"],
    ["lyrics_jax/evaluation"],
    ["lyrics_jax/weights"],
    ["lyrics_jax/study"],
    ["lyrics_jax/planning"],
    ["lyrics_jax"],  # the commands
]
SHARED = ("refiner_export/common", "refiner_export/records", "refiner_export/pages")
# What refines pictures in its own process: two commands, and the world of the study.
REFINING = ("lyrics_jax/generate.py", "lyrics_jax/serve.py", "lyrics_jax/study/world.py")
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorstore"}
PYTORCH = {"torch", "torchvision"}
FORBIDDEN = {  # libraries that a room never imports
    "refiner_export": JAX | {"lyrics_jax"},
    "lyrics_jax": PYTORCH,
    "lyrics_jax/weights": set(),
    "lyrics_jax/torch_model": JAX,
    "lyrics_jax/tasks": PYTORCH | {"jax", "flax"},
    "lyrics_jax/data": PYTORCH | {"jax", "flax"},
}

ROWS = {room: row for row, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(path.relative_to(ROOT) for package in ("refiner_export", "lyrics_jax")
               for path in (ROOT / package).rglob("*.py"))


def longest(names, path: str) -> str | None:
  """The longest of the names that `path` lies in."""
  found = [name for name in names if path == name or path.startswith(f"{name}/")]
  return max(found, key=len, default=None)


def imported(path: pathlib.Path) -> list[tuple[int, str]]:
  """Line and dotted name of each import; `from a import b` gives `a.b`."""
  names = []
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      names += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      package = list(path.parts[:-node.level]) if node.level else []
      module = ".".join(package + ([node.module] if node.module else []))
      names += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
  return names


def file_of(name: str) -> str | None:
  """The file of our packages that a dotted name leads to; the name may end with something that the file defines."""
  parts = name.split(".")
  while parts:
    path = pathlib.Path(*parts)
    if (ROOT / path).is_dir():
      return str(path / "__init__.py")
    if (ROOT / path.with_suffix(".py")).is_file():
      return str(path.with_suffix(".py"))
    parts.pop()
  return None


def problems(path: pathlib.Path) -> list[str]:
  source, found = str(path), []
  room, forbidden = longest(ROWS, source), FORBIDDEN[longest(FORBIDDEN, source)]
  for line, name in imported(path):
    top = name.partition(".")[0]
    if top in forbidden:
      found.append(f"{source}:{line} imports {top}")
    elif top in ("refiner_export", "lyrics_jax"):
      target = file_of(name)
      if target is None or target in ("refiner_export/__init__.py", "lyrics_jax/__init__.py"):
        found.append(f"{source}:{line}: there is no {name}")
      elif not may_import(source, room, longest(ROWS, target)):
        found.append(f"{source}:{line}: {room} may not look into {longest(ROWS, target)} ({name})")
  return found


def may_import(source: str, room: str, target: str) -> bool:
  if room == target:
    return True
  if room.startswith("lyrics_jax") and target.startswith("refiner_export"):
    if source in REFINING:
      return target != "refiner_export/__main__.py"
    return target in SHARED
  if room == "lyrics_jax/torch_model" or target == "lyrics_jax/torch_model":
    return room == "lyrics_jax/weights"  # it travels with an exported model, and knows nothing of ours
  return ROWS[target] < ROWS[room]


@pytest.mark.parametrize("package", ["refiner_export", "lyrics_jax"])
def test_no_arrow_runs_up(package):
  found = []
  for path in FILES:
    if path.parts[0] == package:
      found += problems(path)
  assert not found, "\n".join(found)


def test_the_table_names_what_there_is():
  missing = [room for room in ROWS if not (ROOT / room).exists() and room not in REFINING]
  assert not missing, f"in ORDER, but not there: {missing}"
  folders = {str(path.parent) for path in FILES if path.name == "__init__.py"} - {"refiner_export"}
  assert folders <= set(ROWS), f"not in ORDER: {sorted(folders - set(ROWS))}"


def test_the_list_of_rooms_in_the_documentation():
  """The first column of the table in docs/architecture.md names every folder of both packages, and nothing else."""
  text = (ROOT / "docs" / "architecture.md").read_text()
  described = set(re.findall(r"^\| `([^`]+)/` \|", text, flags=re.MULTILINE))
  folders = {str(path.parent) for path in FILES if path.name == "__init__.py"}
  assert described == folders, f"differ in: {sorted(described ^ folders)}"


@pytest.mark.parametrize("line, room, problem", [
    ("import jax", "refiner_export/export/x.py", "imports jax"),
    ("from lyrics_jax import config", "refiner_export/export/x.py", "imports lyrics_jax"),
    ("import torch", "lyrics_jax/models/x.py", "imports torch"),
    ("import torch", "lyrics_jax/weights/x.py", None),
    ("import jax", "lyrics_jax/data/x.py", "imports jax"),
    ("from refiner_export.export import run", "lyrics_jax/train.py", "may not look into refiner_export/export"),
    ("from refiner_export.export import run", "lyrics_jax/generate.py", None),
    ("from refiner_export.common.settings import Settings", "lyrics_jax/models/x.py", None),
    ("from lyrics_jax.training import loop", "lyrics_jax/models/x.py", "may not look into lyrics_jax/training"),
    ("from lyrics_jax import weights", "lyrics_jax/training/x.py", "may not look into lyrics_jax/weights"),
    ("from refiner_export.pages import page", "refiner_export/records/x.py", "may not look into refiner_export/pages"),
])
def test_the_rules_themselves(tmp_path, monkeypatch, line, room, problem):
  for name in ("refiner_export/export/run.py", "refiner_export/common/settings.py", "lyrics_jax/training/loop.py",
               "lyrics_jax/weights/__init__.py", "refiner_export/pages/page.py"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  path = tmp_path / room
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"def function():\n  {line}\n")
  monkeypatch.setitem(globals(), "ROOT", tmp_path)
  found = problems(pathlib.Path(room))
  assert len(found) == (problem is not None) and (problem or "") in "".join(found)


def test_the_examples_of_the_documentation_run(tmp_path):
  text = (ROOT / "docs" / "architecture.md").read_text()
  blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
  assert len(blocks) == 5
  (tmp_path / "a.jpg").write_bytes(b"photo")
  (tmp_path / "a.txt").write_text("a cat")
  (tmp_path / "all_blocks.py").write_text("\n".join(blocks))
  code = textwrap.dedent("""
      from all_blocks import *
      from lyrics_jax.models.vision.vit import ViTSettings
      for settings in (Folder("."), OCR, MeanSettings(), Small(weight=0.01), Norm(every=100)):
        settings.finalize()
      [unit] = Folder(".").shards()
      [example] = Folder(".").read(unit)
      assert unit.count == 1 and example.captions == ("a cat",) and example.pictures[0].read() == b"photo"
      module = MeanSettings().build(ViTSettings(width=8), 4, None, nnx.Rngs(0))
      features = type("Features", (), {"image": jnp.ones((2, 5, 8))})
      assert module(features).shape == (2, MeanSettings().tokens(None), 4)
      passes = type("Passes", (), {"hidden": 2 * jnp.ones((1, 3, 4))})
      assert Small()(passes).value == 4
      loaded = type("Loaded", (), {"parameters": ({"a": jnp.full(4, 3.0)}, {})})
      assert Norm().build(None, "")(loaded) == {"trained": 6.0}
      """)
  result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr
