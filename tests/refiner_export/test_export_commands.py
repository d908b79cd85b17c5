"""The command lines: a mistake is one line and exit code 2; the gallery shows texts and trusts none of them."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from refiner_export.pages.gallery import render
from refiner_export.records.reader import RecordDirectory
from refiner_export.export.run import export
from refiner_export.sources.coco import Coco

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = "configs/export_quickstart.py"


def command(*arguments):
  line = [sys.executable, "-m", *map(str, arguments)]
  return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments, message", [
    (["refiner_export"], "--config is required"),
    (["refiner_export", "--config", "configs/nothing.py"], "--config: no such file: configs/nothing.py"),
    (["refiner_export", "--config", QUICKSTART, "--config.refiner.gird=3"],
     "config.refiner.gird: unknown field (did you mean grid?)"),
    (["refiner_export", "--config", QUICKSTART, "--config.features.dtype=int4"],
     "config.features.dtype: expected one of ('float16', 'bfloat16', 'int8'), got 'int4'"),
    (["refiner_export", "--config", QUICKSTART, "--config.limit=0"], "config.limit: expected at least 1, got 0"),
    (["refiner_export", "--config", QUICKSTART, "--config.source.annotations=/no.json"],
     "source.annotations not found: /no.json"),
    (["refiner_export", "--config", QUICKSTART, "--shard-range=x"], "--shard-range: expected START:STOP such as 10:20"),
    (["refiner_export", "verify"], "DIR is required: a directory that python -m refiner_export wrote"),
    (["refiner_export", "verify", "/nowhere"], "no manifest.json in /nowhere: run python -m refiner_export"),
    (["refiner_export", "gallery"], "DIR is required: a directory that python -m refiner_export wrote"),
    (["refiner_export", "gallery", "/nowhere"], "no manifest.json in /nowhere: run python -m refiner_export"),
    (["refiner_export", "gallery", "/nowhere", "--limit=no"], "flag --limit=no: invalid literal for int()"),
    (["refiner_export", "gallery", "/nowhere", "--limit=0"], "flag --limit=0: 0 is not a positive integer"),
    (["refiner_export", "gallery", "/nowhere", "/here"], "unexpected argument '/here'")])
def test_mistakes(arguments, message):
  result = command(*arguments)
  assert result.returncode == 2
  assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
  assert result.stdout == ""


def test_quickstart_and_gallery(tmp_path):
  output = tmp_path / "records"
  result = command("refiner_export", "--config", QUICKSTART, f"--config.output={output}", "--config.limit=2",
                   "--config.refiner.grid=3")
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines()[-1].startswith(f"{output}: 2 records, 0 skipped, ")
  result = command("refiner_export", "gallery", output)
  assert result.returncode == 0 and result.stdout.strip() == str(output / "gallery.html"), result.stderr
  page = (output / "gallery.html").read_text()
  assert page.count("data:image/jpeg;base64,") == 2 and '="http' not in page


def test_gallery_escapes_texts(coco, tmp_path, make):
  attack = "<script>alert('x')</script>\" onerror=\"y"
  captions, instances = (json.loads(pathlib.Path(path).read_text()) for path in (coco.captions, coco.instances))
  for entry in captions["annotations"]:
    entry["caption"] = attack
  for category in instances["categories"]:
    category["name"] = attack
  (tmp_path / "captions.json").write_text(json.dumps(captions))
  (tmp_path / "instances.json").write_text(json.dumps(instances))
  export(make(Coco(coco.images, str(tmp_path / "captions.json"), str(tmp_path / "instances.json")), tmp_path / "out"))
  page = render(RecordDirectory(tmp_path / "out"), limit=10)
  # The page has one script, and it holds no text of a record.
  before, script = page.split("<script>")
  assert "&lt;script&gt;" in before and "alert" not in script and 'onerror="' not in page


def test_gallery_says_what_it_leaves_out(finished, tmp_path):
  copy = shutil.copytree(finished, tmp_path / "copy")
  result = command("refiner_export", "gallery", copy, "--limit", "3", "--output", tmp_path / "page.html")
  assert result.returncode == 0, result.stderr
  assert "the first 3 of 4 records" in (tmp_path / "page.html").read_text()


def test_jax_and_torch_are_not_imported():
  code = ("import sys, refiner_export.export.run, refiner_export.pages.gallery, refiner_export.sources.coco; "
          "print([name for name in ('jax', 'torch', 'tensorflow', 'pycocotools') if name in sys.modules])")
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.stdout.strip() == "[]", result.stderr
