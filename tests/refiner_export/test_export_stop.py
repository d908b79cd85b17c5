"""SIGTERM and Ctrl-C end an export within five seconds, whatever its threads wait for."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 5
SOURCE = '''
import dataclasses, hashlib, pathlib, threading, time
from refiner_export.common.regular_file import read_regular
from refiner_export.sources.base import SourceExample, SourcePicture
from refiner_export.sources.source import SourceSettings, Unit

def mark(folder):
  (pathlib.Path(folder) / "begun").touch()

def compute(folder):
  """One long call of C, which no signal interrupts."""
  mark(folder)
  return hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)

def open_pipe(folder):
  mark(folder)
  return open(folder + "/pipe", "rb").read()

def wait(folder):
  mark(folder)
  threading.Event().wait()

def sleep(folder):
  mark(folder)
  time.sleep(1000)

@dataclasses.dataclass(unsafe_hash=True)
class Stuck(SourceSettings):
  folder: str
  what: str
  where: str
  name = "stuck"

  def shards(self):
    return [Unit("a", 4), Unit("b", 4)]

  def read(self, unit):
    hang = {"compute": compute, "pipe": open_pipe, "wait": wait, "sleep": sleep}[self.what]
    for k in range(4):
      if self.where == "source" and k == 2:
        hang(self.folder)
      pictures = (SourcePicture(lambda: hang(self.folder)),) if self.where == "picture" else ()
      yield SourceExample(f"{unit.name}{k}", pictures, ("a caption",))
'''


@pytest.fixture
def start(tmp_path):
  """Starts an export that hangs, and waits until it does."""
  (tmp_path / "stuck.py").write_text(SOURCE)
  os.mkfifo(tmp_path / "pipe")

  def run(what, where, workers):
    config = tmp_path / "config.py"
    config.write_text(f"""
from refiner_export.export.config import ExportConfig, RunnerSettings
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from stuck import Stuck
def get_config():
  return ExportConfig({str(tmp_path / "out")!r}, Stuck({str(tmp_path)!r}, {what!r}, {where!r}),
                      ClassicalRefiner(grid=2), runner=RunnerSettings(workers={workers}), batch=2)
""")
    process = subprocess.Popen([sys.executable, "-m", "refiner_export", "--config", str(config)], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
      assert process.poll() is None, process.communicate()
      time.sleep(0.05)
    time.sleep(0.2)
    return process

  return run


@pytest.mark.parametrize("what, where, workers, stop", [
    ("pipe", "picture", 1, signal.SIGINT), ("pipe", "picture", 2, signal.SIGTERM),
    ("wait", "picture", 1, signal.SIGTERM), ("compute", "picture", 1, signal.SIGINT),
    ("compute", "source", 1, signal.SIGTERM), ("compute", "source", 2, signal.SIGINT),
    ("pipe", "source", 1, signal.SIGINT), ("sleep", "source", 1, signal.SIGTERM)])
def test_the_end_comes_within_seconds(start, tmp_path, what, where, workers, stop):
  process = start(what, where, workers)
  begun = time.monotonic()
  process.send_signal(stop)
  try:
    _, errors = process.communicate(timeout=60)
  finally:
    process.kill()
  assert time.monotonic() - begun < SECONDS
  assert process.returncode == 128 + stop
  assert errors == "stopped; what is finished is kept, and the same command goes on from there\n"
  assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_error_does_not_wait_for_reads_that_hang(tmp_path):
  """One picture is missing, another is a pipe that its source opens without care."""
  (tmp_path / "stuck.py").write_text(SOURCE)
  (tmp_path / "config.py").write_text(f"""
import threading
from refiner_export.export.config import ExportConfig, ReadingSettings, RunnerSettings
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.base import SourceExample, SourcePicture
from stuck import Stuck
class Mixed(Stuck):
  def read(self, unit):
    for k in range(4):
      picture = SourcePicture(fail if k == 0 else threading.Event().wait)
      yield SourceExample(f"{{unit.name}}{{k}}", (picture,), ("a caption",))
def fail():
  raise OSError(5, "Input/output error")
def get_config():
  return ExportConfig({str(tmp_path / "out")!r}, Mixed("", "", ""), ClassicalRefiner(grid=2), batch=1,
                      runner=RunnerSettings(reading=ReadingSettings(tries=1)))
""")
  begun = time.monotonic()
  result = subprocess.run([sys.executable, "-m", "refiner_export", "--config", str(tmp_path / "config.py")], cwd=ROOT,
                          capture_output=True, text=True, timeout=50)
  assert result.returncode == 2 and time.monotonic() - begun < 40
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "cannot be read" in result.stderr
