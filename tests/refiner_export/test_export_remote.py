"""An export into an object store, which here is in memory: the same bytes, and nothing that only a disk can do."""

import pathlib

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from refiner_export.records.reader import RecordDirectory
from refiner_export.export.run import ShardRange, export
from refiner_export.common.settings import UserError

OUTPUT = "gs://bucket/records"


class Bucket(MemoryFileSystem):
  """Objects under gs://."""
  protocol, cachable = "gs", False

  def __init__(self):
    super().__init__(global_store=False)

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).removeprefix("gs://").strip("/")


@pytest.fixture
def bucket(monkeypatch):
  """What gs:// leads to for the time of a test."""
  found = Bucket()
  monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: found)
  monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: Bucket)
  return found


def contents(bucket):
  return {name.rpartition("/")[2]: bucket.cat_file(name) for name in bucket.find("/bucket/records")}


def test_the_same_bytes_as_on_a_disk(bucket, coco, finished, make):
  export(make(coco, OUTPUT))
  assert contents(bucket) == {path.name: path.read_bytes() for path in pathlib.Path(finished).iterdir()}
  assert [record.id for record in (RecordDirectory(OUTPUT)[k] for k in range(4))] == ["1", "2", "3", "5"]


def test_going_on_and_mending(bucket, coco, make, capsys):
  config = make(coco, OUTPUT)
  assert export(config, ShardRange(1, 2)) is None
  assert export(config).records == 4
  assert "1 of 3 shards are finished already" in capsys.readouterr().out
  expected = contents(bucket)
  bucket.rm(next(name for name in bucket.find("/bucket/records") if name.endswith("00002-of-00003")))
  export(config)
  assert contents(bucket) == expected and not any(name.startswith(".") for name in expected)
  with pytest.raises(UserError, match="^gs://bucket/records was begun with another config.limit, config.source: "):
    export(make(coco, OUTPUT, limit=1))


def test_growing(bucket, coco, finished, make):
  export(make(coco, OUTPUT, limit=2))
  export(make(coco, OUTPUT, limit=5))
  export(make(coco, "gs://bucket/once", limit=5))
  once = {name.rpartition("/")[2]: bucket.cat_file(name) for name in bucket.find("/bucket/once")}
  assert contents(bucket) == once


@pytest.mark.parametrize("path, remedy", [
    ("gs://bucket/x", "the package that opens gs:// is missing: pip install gcsfs"),
    ("s3://bucket/x", "the package that opens s3:// is missing: pip install s3fs"),
    ("nothing://bucket/x", "nothing:// is unknown: name a folder, gs:// or s3://")])
def test_a_store_that_cannot_be_opened(coco, make, monkeypatch, path, remedy):
  def is_missing(scheme):
    raise ImportError("install something")

  monkeypatch.setattr(fsspec, "get_filesystem_class", is_missing)
  for attempt in make, RecordDirectory:
    with pytest.raises(UserError) as error:
      attempt(*((coco, path) if attempt is make else (path,)))
    assert str(error.value) == f"{path}: {remedy}"
