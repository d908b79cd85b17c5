"""A source that a user has written, in a file of theirs: every runner of the exporter takes it."""

import pathlib
import re
import subprocess
import sys

import pytest
from odd_sources import png

from refiner_export.common.settings import UserError
from refiner_export.export.config import RunnerSettings
from refiner_export.export.run import export
from refiner_export.records.reader import RecordDirectory
from refiner_export.sources.source import SourceSettings, Unit

ROOT = pathlib.Path(__file__).parents[2]

# The example of the documentation.
SOURCE = re.search(r"## A source of your own.*?```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)[1]

CONFIG = '''
from refiner_export.export.config import ExportConfig
from refiner_export.refiners.classical.refiner import ClassicalRefiner
{source}

def get_config():
  return ExportConfig("out", Albums({folder!r}), ClassicalRefiner(grid=3))
'''


def contents(directory):
  return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


@pytest.fixture
def albums(tmp_path):
  """Four albums of one to four pictures."""
  for album in range(4):
    (tmp_path / "albums" / f"album {album}").mkdir(parents=True)
    for k in range(album + 1):
      (tmp_path / "albums" / f"album {album}" / f"picture {k}.jpg").write_bytes(png(10 * album + k))
  return str(tmp_path / "albums")


def run(config, output, workers):
  result = subprocess.run(
      [sys.executable, "-m", "refiner_export", "--config", str(config), f"--config.output={output}",
       f"--config.runner.workers={workers}"], cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("beside", [True, False])
def test_a_class_in_a_users_file(albums, tmp_path, beside):
  """Beside the configuration file, or in it."""
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "my_source.py").write_text(SOURCE)
  source = "from my_source import Albums" if beside else SOURCE
  config = folder / "export_albums.py"
  config.write_text(CONFIG.format(source=source, folder=albums))
  for workers in 1, 2:
    run(config, tmp_path / str(workers), workers)
  assert contents(tmp_path / "1") == contents(tmp_path / "2")
  directory = RecordDirectory(tmp_path / "2")
  assert [shard.records for shard in directory.manifest.shards] == [1, 2, 3, 4]
  assert directory[4].id == "album 2/picture 1" and directory[4].captions == ("picture 1",)
  assert directory[4].source == directory.manifest.source == "albums"


def test_a_class_that_workers_cannot_import(tmp_path, make):
  class Local(SourceSettings):
    name = "local"

    def shards(self):
      return [Unit("a", 1), Unit("b", 1)]

  with pytest.raises(UserError, match="Local"):
    export(make(Local(), tmp_path / "out", runner=RunnerSettings(workers=2)))


def test_a_module_that_workers_do_not_find(albums, tmp_path, make, monkeypatch):
  """It was on the path of this process when it was imported, and is no longer."""
  (tmp_path / "vanished_source.py").write_text(SOURCE)
  monkeypatch.syspath_prepend(str(tmp_path))
  from vanished_source import Albums
  sys.path.remove(str(tmp_path))
  with pytest.raises(UserError, match="^workers cannot import a class of the configuration .*No module named "
                                      "'vanished_source'.*: define it in a module beside the configuration file"):
    export(make(Albums(albums), tmp_path / "out", runner=RunnerSettings(workers=2)))


def test_a_class_without_a_name(tmp_path, make):
  with pytest.raises(UserError, match="^config.source: class SourceSettings has no name"):
    make(SourceSettings(), tmp_path / "out")
