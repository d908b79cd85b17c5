"""The Beam runner, on Beam's local engine: the shards that any other runner makes."""

import functools
import pathlib

import pytest
from odd_refiners import LoggingRefiner, UnbuildableRefiner

from refiner_export.export.run import ShardRange, export
from refiner_export.common.settings import UserError

pytest.importorskip("apache_beam")
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

from refiner_export.export.beam_pipeline import run_with_beam  # noqa: E402

# The engine inside `DirectRunner`, which would first look for another one on the network.
LOCAL = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"
PROCESSES = [LOCAL, "--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def contents(directory):
  return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


def runner(*options):
  return functools.partial(run_with_beam, PipelineOptions(options))


def test_beam_makes_the_same_bytes(coco, finished, tmp_path, make):
  log = tmp_path / "log"
  config = make(coco, tmp_path / "out", refiner=LoggingRefiner(grid=4, log=str(log)))
  assert export(config, runner=runner(LOCAL)).records == 4
  assert contents(tmp_path / "out") == contents(finished)
  assert log.read_text().count("\n") == 1  # Beam's threads share one refiner, and the model in it


def test_beam_goes_on_where_another_runner_stopped(coco, finished, tmp_path, make, capsys):
  config = make(coco, tmp_path / "out")
  export(config, ShardRange(1, 2))
  export(config, runner=runner(LOCAL))
  assert "1 of 3 shards are finished already" in capsys.readouterr().out
  assert contents(tmp_path / "out") == contents(finished)


def test_an_error_arrives(coco, tmp_path, make):
  with pytest.raises(UserError, match="weights not found"):
    export(make(coco, tmp_path / "out", refiner=UnbuildableRefiner(grid=4)), runner=runner(LOCAL))


@pytest.mark.slow
def test_beam_in_several_processes(coco, finished, tmp_path, make):
  export(make(coco, tmp_path / "out"), runner=runner(*PROCESSES))
  assert contents(tmp_path / "out") == contents(finished)
