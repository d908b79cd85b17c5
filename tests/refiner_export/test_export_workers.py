"""Several processes, on one machine or many: the same bytes, no work lost, and errors that arrive."""

import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import random
import socket
import subprocess
import sys
import types

import pytest
from odd_refiners import DyingRefiner, LoggingRefiner, UnbuildableRefiner

from refiner_export.export import pipeline
from refiner_export.export import shard
from refiner_export.common import unfinished
from refiner_export.export import workers
from refiner_export.export.config import ExportConfig, RunnerSettings
from refiner_export.export.plan import read_plan
from refiner_export.export.reports import Report
from refiner_export.records.record import RecordError
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.export.run import ShardRange, export, finalise
from refiner_export.common.settings import UserError
from refiner_export.export.shard import export_shard
from refiner_export.common.unfinished import remove_abandoned, unfinished_path

ROOT = pathlib.Path(__file__).parents[2]
SHARDS = 5  # each of one picture; one shard is empty, because its picture cannot be read


def digests(directory):
  """File name -> hash, hidden files included."""
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pathlib.Path(directory).iterdir()}


@pytest.fixture(scope="module")
def single(coco, tmp_path_factory):
  """An export by one process, a picture in each shard."""
  output = tmp_path_factory.mktemp("single") / "records"
  config = ExportConfig(str(output), coco, ClassicalRefiner(grid=4), records_per_shard=1)
  config.finalize()
  export(config)
  return output


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(coco, single, tmp_path, make, count):
  log = tmp_path / "log"
  refiner = LoggingRefiner(grid=4, log=str(log))
  manifest = export(make(
      coco, tmp_path / "out", refiner=refiner, records_per_shard=1, batch=count, runner=RunnerSettings(workers=count)))
  assert manifest.records == 4 and digests(tmp_path / "out") == digests(single)
  built = log.read_text().split()
  assert len(built) == len(set(built)) <= count  # once in each process; who comes late may find nothing to do
  assert str(os.getpid()) not in built and not multiprocessing.active_children()


@pytest.mark.parametrize("runner", [RunnerSettings(workers=0, threads=1, prefetch=0), RunnerSettings(prefetch=7)])
def test_threads_change_nothing(coco, single, tmp_path, make, runner):
  log = tmp_path / "log"
  export(make(coco, tmp_path / "out", refiner=LoggingRefiner(grid=4, log=str(log)), records_per_shard=1, runner=runner))
  assert digests(tmp_path / "out") == digests(single)
  assert log.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("seed", range(3))
def test_shard_ranges_in_any_order_give_the_same_bytes(coco, single, tmp_path, make, capsys, seed):
  config = make(coco, tmp_path / "out", records_per_shard=1)
  ranges = ["0:2", "2:3", "3:"]
  random.Random(seed).shuffle(ranges)
  for text in ranges[:-1]:
    assert export(config, ShardRange.parse(text)) is None
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" of {SHARDS} are still to be made")
  assert export(config, ShardRange.parse(ranges[-1])).records == 4
  assert digests(tmp_path / "out") == digests(single)


def test_a_run_without_a_range_completes_what_ranges_began(coco, single, tmp_path, make, capsys):
  config = make(coco, tmp_path / "out", records_per_shard=1)
  export(config, ShardRange(1, 3))
  assert export(config).records == 4
  assert f"2 of {SHARDS} shards are finished already" in capsys.readouterr().out
  assert digests(tmp_path / "out") == digests(single)


@pytest.mark.parametrize("text, message", [
    ("10", "expected START:STOP such as 10:20, got '10'"), ("a:b", "expected START:STOP"),
    ("-3:2", "expected START:STOP"), ("3:3", "there is no shard in it"), ("3:2", "there is no shard in it"),
    ("5:9", "begins at shard 5, the last of 5 is 4")])
def test_bad_ranges(text, message):
  with pytest.raises(UserError, match=message):
    ShardRange.parse(text).of(SHARDS)


@pytest.mark.parametrize("name, least", [("workers", 0), ("threads", 1), ("prefetch", 0)])
def test_bad_settings(coco, tmp_path, make, name, least):
  with pytest.raises(UserError, match=f"^config.runner.{name}: expected at least {least}, got {least - 1}$"):
    make(coco, tmp_path / "out", runner=RunnerSettings(**{name: least - 1}))


def test_a_range_may_end_behind_the_last_shard():
  assert list(ShardRange.parse("3:99").of(SHARDS)) == [3, 4] and list(ShardRange.parse(":").of(2)) == [0, 1]


def test_a_shard_is_made_once_and_described(coco, single, tmp_path, make, monkeypatch):
  config = make(coco, tmp_path / "out", records_per_shard=1)
  counted = []
  info = export_shard(config, 3, lambda *counts: counted.append(counts))
  assert (info.records, info.bytes) == (0, 0) and counted == [(1, 1)]  # the picture that is none
  assert export_shard(config, 1).sha256 == digests(single)[info.file.replace("-00003-", "-00001-")]
  monkeypatch.setattr(pipeline, "refine_read", None)
  assert export_shard(config, 3) == info
  with pytest.raises(UserError, match="shard 0 is not finished"):
    finalise(read_plan(config))


def test_two_commands_on_one_directory(coco, single, tmp_path):
  config = tmp_path / "config.py"
  config.write_text(f"""
from refiner_export.export.config import ExportConfig
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.coco import Coco
def get_config():
  return ExportConfig({str(tmp_path / "out")!r}, Coco({coco.images!r}, {coco.captions!r}, {coco.instances!r}),
                      ClassicalRefiner(grid=4), records_per_shard=1)
""")
  line = [sys.executable, "-m", "refiner_export", "--config", str(config)]
  both = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in "12"]
  for process in both:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
  assert digests(tmp_path / "out") == digests(single)


def test_another_process_completed_the_export_meanwhile(coco, single, tmp_path, make):
  """The reports of the shards are gone by then, and the manifest counts instead."""
  config = make(coco, tmp_path / "out", records_per_shard=1)

  def late(plan, numbers):
    export_shard(config, 0)
    export(make(coco, tmp_path / "out", records_per_shard=1, batch=3))  # another configuration object, read anew
    for number in numbers:
      export_shard(config, number)

  assert export(config, runner=late).records == 4
  assert digests(tmp_path / "out") == digests(single)


def test_only_the_lost_shard_of_a_complete_export_is_made_again(coco, single, tmp_path, make, monkeypatch):
  config = make(coco, tmp_path / "out", records_per_shard=1)
  export(config)
  next((tmp_path / "out").glob("*00002-of-00005")).unlink()
  refine, seen = pipeline.refine_read, []
  monkeypatch.setattr(pipeline, "refine_read", lambda examples, *rest: seen.extend(examples) or refine(examples, *rest))
  export(config)
  assert [example.id for example in seen] == ["3"] and digests(tmp_path / "out") == digests(single)


def test_counts_that_do_not_add_up_are_noticed(coco, single, tmp_path, make, capsys):
  config = make(coco, tmp_path / "out", records_per_shard=1)
  export(config, ShardRange(0, 4))
  plan = read_plan(config)
  report = shard.report_path(plan, 3)
  right = Report.from_line(report.read_bytes())
  report.write_bytes(dataclasses.replace(right, skipped=2 * right.skipped).to_line())
  with pytest.raises(RecordError, match="00003-of-00005: 0 records and 2 skipped examples, 1 planned"):
    shard.read_report(plan, 3)
  shard.report_path(plan, 2).write_text("{")
  with pytest.raises(RecordError, match="not a report of a shard"):
    shard.read_report(plan, 2)
  export(config)
  assert capsys.readouterr().out.count("writing a shard again: ") == 2
  assert digests(tmp_path / "out") == digests(single)


def test_errors_of_a_worker_arrive(coco, tmp_path, make):
  runner = RunnerSettings(workers=2)
  with pytest.raises(UserError, match="^weights not found$"):
    export(make(coco, tmp_path / "out", refiner=UnbuildableRefiner(), records_per_shard=1, runner=runner))
  with pytest.raises(RuntimeError, match="^worker [01], shard [01]:\n(.*\n)*ZeroDivisionError: a bug"):
    export(make(coco, tmp_path / "bug", refiner=UnbuildableRefiner(mistake=False), records_per_shard=1, runner=runner))
  assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_named_and_the_export_goes_on_from_there(coco, single, tmp_path, make):
  bomb = tmp_path / "bomb"
  bomb.touch()
  config = make(coco, tmp_path / "out", refiner=DyingRefiner(grid=4, bomb=str(bomb)), records_per_shard=1,
                runner=RunnerSettings(workers=2))
  with pytest.raises(UserError, match=r"^worker [01] died at shard \d \(SIGKILL\)\. .*lower config.runner.workers"):
    export(config)
  assert not multiprocessing.active_children() and not list((tmp_path / "out").glob(".unfinished*"))
  export(config)
  assert digests(tmp_path / "out") == digests(single)


def test_each_worker_takes_a_device_in_turn(monkeypatch):
  taken = []
  cuda = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 3, set_device=taken.append)
  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
  for worker in range(5):
    workers._take_device(worker)
  assert taken == [0, 1, 2, 0, 1]
  cuda.is_available = lambda: False
  workers._take_device(1)
  assert len(taken) == 5


def test_what_the_dead_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
  dead, unreaped = (subprocess.Popen([sys.executable, "-c", ""]) for _ in range(2))
  dead.wait()
  os.waitid(os.P_PID, unreaped.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its exit code
  target = tmp_path / "shard-00001"
  mine = unfinished_path(target)
  assert mine != unfinished_path(target) and mine.name.startswith(".") and mine.name.endswith(".shard-00001")
  renamed = lambda old, new: mine.parent / mine.name.replace(old, new, 1)
  ours, here = f"+{os.getpid()}+", socket.gethostname()
  kept = [mine, renamed(ours, f"+{os.getppid()}+"), renamed(here, "elsewhere"), target, tmp_path / ".unfinished.note"]
  removed = [renamed(ours, f"+{dead.pid}+"), renamed(ours, f"+{unreaped.pid}+"),
             renamed(f"+{unfinished._PROCESS}+", "+01234567+"), renamed(here, "long-ago")]
  for path in [*kept, *removed]:
    path.write_text("half")
  os.utime(removed[-1], (1, 1))
  remove_abandoned(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept}


def test_a_write_that_fails_leaves_nothing(tmp_path, coco, make, monkeypatch):
  def fail(*_):
    raise OSError("disk full")

  config = make(coco, tmp_path / "out")
  monkeypatch.setattr(type(ClassicalRefiner(grid=4).detector), "detect", fail)
  with pytest.raises(OSError, match="disk full"):
    export(config)
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["export_config.json"]
