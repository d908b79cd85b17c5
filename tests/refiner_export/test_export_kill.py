"""Killed at any moment, an export goes on and ends with the bytes of one that was not."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

ROOT, HERE = pathlib.Path(__file__).parents[2], pathlib.Path(__file__).parent


def contents(directory):
  """File name -> bytes, hidden files included."""
  return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


def write_source(folder, pictures):
  """Writes a COCO set of tiny pictures with one object each; every seventh file is no picture.

  Returns the Python text of its `Coco`.
  """
  (folder / "images").mkdir(parents=True)
  generator = np.random.default_rng(0)
  for k in range(pictures):
    path = folder / "images" / f"{k}.png"
    Image.fromarray(generator.integers(0, 255, (24, 32, 3), np.uint8)).save(path)
    if k % 7 == 3:
      path.write_text("no picture")
  images = [{"id": k, "file_name": f"{k}.png", "width": 32, "height": 24} for k in range(pictures)]
  (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": [
      {"id": k, "image_id": k, "caption": f"caption {k}"} for k in range(pictures)]}))
  (folder / "instances.json").write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "cat"}],
      "annotations": [{"id": k, "image_id": k, "category_id": 1, "bbox": [k % 9, 3, 12, 9], "iscrowd": 0,
                       "segmentation": []} for k in range(pictures)]}))
  return f"Coco(*[{str(folder)!r} + name for name in ('/images', '/captions.json', '/instances.json')])"


def write_config(path, source, records_per_shard, grid):
  path.write_text(f"""
from refiner_export.export.config import ExportConfig
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.coco import Coco
def get_config():
  return ExportConfig("out", {source}, ClassicalRefiner(grid={grid}), records_per_shard={records_per_shard}, batch=2)
""")
  return path


def kill(how, config, folder):
  """Runs `killer.py`. Returns how many exports it killed."""
  folder.mkdir()
  result = subprocess.run([sys.executable, str(HERE / "killer.py"), how, str(config), str(folder)], cwd=ROOT,
                          env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=3000)
  assert result.returncode == 0, result.stderr
  return int(result.stdout.split()[-1])


def test_at_random_moments(tmp_path):
  config = write_config(tmp_path / "config.py", write_source(tmp_path / "source", 60), records_per_shard=1, grid=10)
  assert kill("moments", config, tmp_path / "out") >= 20
  expected = contents(tmp_path / "out" / "reference")
  exports = [path for path in (tmp_path / "out").iterdir() if path.name != "reference"]
  assert exports and all(contents(path) == expected for path in exports)
  assert len(expected) == 2 * 60 + 6 and expected["errors.jsonl"].count(b"\n") == 9


def test_before_each_operation_on_a_file(tmp_path):
  config = write_config(tmp_path / "config.py", write_source(tmp_path / "source", 5), records_per_shard=2, grid=2)
  kills = kill("operations", config, tmp_path / "out")
  assert kills > 3 * 6 + 8  # files of three shards, and what stands for the whole
  expected = contents(tmp_path / "out" / str(kills))
  assert all(contents(tmp_path / "out" / str(k)) == expected for k in range(kills))


def test_before_each_operation_on_a_file_with_units_of_unknown_size(tmp_path):
  """Two units with three examples, of which one is no picture."""
  for unit, pictures in (0, "[1], [2, 3]"), (1, '["no picture"]'):
    lines = [json.dumps({"caption": "a", "pictures": seeds}) for seeds in json.loads(f"[{pictures}]")]
    (tmp_path / f"{unit}.jsonl").write_text("\n".join(lines))
  config = tmp_path / "config.py"
  config.write_text(f"""
from odd_sources import Lines
from refiner_export.export.config import ExportConfig
from refiner_export.refiners.classical.refiner import ClassicalRefiner
def get_config():
  return ExportConfig("out", Lines({str(tmp_path)!r}), ClassicalRefiner(grid=2), batch=1)
""")
  kills = kill("operations", config, tmp_path / "out")
  assert kills > 2 * 6 + 8
  expected = contents(tmp_path / "out" / str(kills))
  assert all(contents(tmp_path / "out" / str(k)) == expected for k in range(kills))


@pytest.fixture
def command(tmp_path):
  """Starts the command with two workers on 12 shards."""
  config = write_config(tmp_path / "config.py", write_source(tmp_path / "source", 12), records_per_shard=1, grid=16)

  def start(output, workers):
    line = [sys.executable, "-m", "refiner_export", "--config", str(config), f"--config.output={output}",
            f"--config.runner.workers={workers}"]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  return start


def finished(directory):
  return len(list(directory.glob(".report.*.json")))


def wait_for(shards, output, process):
  while finished(output) < shards:
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)


def test_the_command_itself(command, tmp_path):
  reference, output = command(tmp_path / "reference", 1), tmp_path / "out"
  assert reference.wait(300) == 0, reference.communicate()
  for shards in (1, 5):
    process = command(output, 2)
    wait_for(shards, output, process)
    process.kill()
    process.communicate(timeout=300)  # both pipes end only when its workers have ended too
  process = command(output, 2)
  out, errors = process.communicate(timeout=300)
  assert process.returncode == 0 and " of 12 shards are finished already" in out, errors
  assert contents(output) == contents(tmp_path / "reference")


@pytest.mark.parametrize("workers, stop", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_stopped_in_good_order(command, tmp_path, workers, stop):
  output = tmp_path / "out"
  process = command(output, workers)
  wait_for(1, output, process)
  process.send_signal(stop)
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 128 + stop
  assert errors == "stopped; what is finished is kept, and the same command goes on from there\n"
  assert finished(output) >= 1 and not list(output.glob(".unfinished.*")) and not (output / "manifest.json").exists()
