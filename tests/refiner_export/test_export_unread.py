"""Pictures that cannot be read for a while leave no hole: the export stops or marks them, and ends with equal bytes."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import threading

import pytest

from refiner_export.common.settings import UserError
from refiner_export.export import fetching
from refiner_export.export.config import ReadingSettings, RunnerSettings
from refiner_export.export.run import ShardRange, export

SOME = RunnerSettings(reading=ReadingSettings(unread=0.5))
ANY = RunnerSettings(reading=ReadingSettings(unread=1.0))


def contents(directory):
  return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


@pytest.fixture
def own(coco, tmp_path):
  """The tiny COCO set in a folder of its own, whose pictures can be taken away."""
  return dataclasses.replace(coco, images=str(shutil.copytree(coco.images, tmp_path / "images")))


@pytest.fixture
def undisturbed(own, tmp_path, make):
  output = tmp_path / "undisturbed"
  export(make(own, output))
  return contents(output)


@contextlib.contextmanager
def away(source, *names):
  folder = pathlib.Path(source.images)
  for name in names:
    (folder / name).rename(folder.parent / name)
  yield
  for name in names:
    (folder.parent / name).rename(folder / name)


@pytest.mark.parametrize("names", [("1.jpg",), ("1.jpg", "3.jpg"), ("1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg")])
def test_pictures_that_are_away_stop_the_export(own, undisturbed, tmp_path, make, names):
  output = tmp_path / "out"
  with away(own, *names):
    with pytest.raises(UserError, match="of 2 examples of a shard cannot be read now; the first: [^\n]*$"):
      export(make(own, output))
    assert not (output / "manifest.json").exists()
  export(make(own, output))
  assert contents(output) == undisturbed


@pytest.mark.parametrize("names", [("1.jpg",), ("2.jpg", "3.jpg"), ("5.jpg",)])
def test_an_allowed_share_is_marked_and_read_again(own, undisturbed, tmp_path, make, capsys, names):
  output = tmp_path / "out"
  with away(own, *names):
    export(make(own, output, runner=ANY))
    first = contents(output)
    lines = [json.loads(line) for line in first["errors.jsonl"].decode().splitlines()]
    assert [line["id"] for line in lines if line.get("cause") == "reading"] == [name[0] for name in names]
    assert {"id": "4", "reason": "not a picture"} in lines
    export(make(own, output, runner=ANY))  # they are still away
    assert contents(output) == first
  capsys.readouterr()
  export(make(own, output, runner=ANY))
  assert "reading again what could not be read in " in capsys.readouterr().out
  assert contents(output) == undisturbed
  export(make(own, output))
  assert "is complete already" in capsys.readouterr().out


def test_ranges_keep_what_could_not_be_read(own, undisturbed, tmp_path, make):
  output = tmp_path / "out"
  with away(own, "1.jpg"):
    export(make(own, output, runner=SOME), ShardRange(0, 1))
  assert export(make(own, output, runner=SOME), ShardRange(1, 3)).skipped == 2  # it completes the directory
  export(make(own, output, runner=SOME))
  assert contents(output) == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_second_look_goes_on(own, undisturbed, tmp_path, make, workers):
  """With the picture back, the shard was made again and the manifest was not written."""
  output = tmp_path / "out"
  runner = dataclasses.replace(ANY, workers=workers)
  with away(own, "1.jpg"):
    export(make(own, output, runner=runner))

  def stopped(plan, numbers):
    from refiner_export.export.shard import export_shard
    export_shard(plan.config, numbers[0])
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    export(make(own, output, runner=runner), runner=stopped)
  export(make(own, output, runner=runner))
  assert contents(output) == undisturbed


@pytest.mark.parametrize("one_in", [10, 3, 2])
def test_reads_that_fail_one_time_in_ten(own, undisturbed, tmp_path, make, monkeypatch, one_in):
  calls, counting, within = 0, threading.Lock(), fetching._within

  def failing(seconds, function):
    nonlocal calls
    with counting:
      calls += 1
      number = calls
    if number % one_in == 0:
      raise OSError(5, "Input/output error")
    return within(seconds, function)

  monkeypatch.setattr(fetching, "_within", failing)
  export(make(own, tmp_path / "out", runner=RunnerSettings(reading=ReadingSettings(tries=30))))
  assert contents(tmp_path / "out") == undisturbed
