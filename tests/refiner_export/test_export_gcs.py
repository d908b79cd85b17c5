"""Exports into Google Cloud Storage, as an emulator answers: the same bytes, also with failing and slow answers."""

import asyncio
import os
import pathlib
import subprocess
import sys

import pytest

from refiner_export.common.settings import UserError
from refiner_export.export.repair import repair
from refiner_export.export.run import ShardRange, export
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.verify import verify

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store():
  from object_store import open_store  # its package is there for the slow tests only
  with pytest.MonkeyPatch.context() as patch, open_store() as found:
    patch.setenv("STORAGE_EMULATOR_HOST", found.url)
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks another service, which has no emulator
    yield found


@pytest.fixture
def bucket(store, request):
  """A new folder in the store, and how the store answers in this test."""
  store.failing, store.slow, store.requests, store.failed = 0.0, 0.0, 0, 0
  yield f"gs://bucket/{request.node.name}"
  store.failing = store.slow = 0.0


def contents(directory):
  from etils import epath
  return {path.name: path.read_bytes() for path in epath.Path(directory).iterdir()}


def test_the_same_bytes_as_on_a_disk(bucket, coco, finished, make):
  export(make(coco, bucket))
  assert contents(bucket) == contents(finished)
  records = RecordDirectory(bucket)
  assert [records[k].id for k in range(4)] == ["1", "2", "3", "5"] and list(verify(bucket)) == []


@pytest.fixture
def short_pauses(monkeypatch):
  """gcsfs waits up to half a minute before it tries again; here it waits a hundredth of that."""
  pause = asyncio.sleep
  monkeypatch.setattr(asyncio, "sleep", lambda seconds, *result: pause(seconds / 100, *result))


def test_failing_and_slow_answers(bucket, store, coco, finished, make, short_pauses):
  """One answer in eight is an error, and any may take a twentieth of a second."""
  store.failing, store.slow = 0.125, 0.05
  export(make(coco, bucket), ShardRange(1, 2))
  export(make(coco, bucket))
  records = RecordDirectory(bucket)
  read = [records[k].id for k in range(4)]
  assert store.failed > 5
  store.failing = store.slow = 0
  assert read == ["1", "2", "3", "5"] and contents(bucket) == contents(finished)


def test_a_store_that_does_not_answer(bucket, store, coco, make, short_pauses):
  store.failing = 1
  for attempt in (lambda: export(make(coco, bucket)), lambda: RecordDirectory(bucket)):
    with pytest.raises(UserError, match=rf"^[^\n]*{bucket}[^\n]*: [^\n]*cannot be (read|used now) \([^\n]*$"):
      attempt()


def test_damage_and_growth(bucket, coco, finished, make):
  from etils import epath
  export(make(coco, bucket, limit=2))
  export(make(coco, bucket))
  whole = contents(bucket)
  assert whole == contents(finished)
  shard = next(path for path in epath.Path(bucket).iterdir() if path.name.endswith("00000-of-00003"))
  shard.write_bytes(b"\0" + shard.read_bytes()[1:])
  (epath.Path(bucket) / "manifest.json").unlink()
  repair(make(coco, bucket))
  assert contents(bucket) == whole


def test_processes_that_share_nothing_but_the_store(bucket, coco, finished, make, tmp_path):
  """Each makes some shards; the last one completes the directory, and a trainer's reader opens it."""
  config = tmp_path / "config.py"
  config.write_text(f"""
from refiner_export.export.config import ExportConfig
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.coco import Coco
def get_config():
  return ExportConfig({bucket!r}, {coco!r}, ClassicalRefiner(grid=4), records_per_shard=2)
""")
  for number in range(3):
    result = subprocess.run(
        [sys.executable, "-m", "refiner_export", "--config", str(config), f"--shard-range={number}:{number + 1}"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
        timeout=300)
    assert result.returncode == 0, result.stderr
  assert contents(bucket) == contents(finished)
