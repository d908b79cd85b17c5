"""A damaged directory ends with the bytes of a whole one, and only what was damaged is made again."""

import errno
import json
import shutil

import pytest
from etils import epath

from refiner_export.common.settings import UserError
from refiner_export.export import run
from refiner_export.export.config import ImageSettings
from refiner_export.export.repair import repair
from refiner_export.records.reader import RecordDirectory

BESIDE = "manifest.json", "errors.jsonl", "reports.jsonl", "export_config.json", "features.json", "dataset_info.json"
SHARD = "lyrics_records-train.tfrecord-0000{}-of-00003"


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / "copy")


def flip(path, position=None):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if position is None else position] ^= 1
  path.write_bytes(data)


def lose(path):
  path.unlink()


def empty(path):
  path.write_bytes(b"")


def cut(path):
  path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("mend", [run.export, repair])
@pytest.mark.parametrize("damage", [flip, lose, empty, cut])
@pytest.mark.parametrize("name", BESIDE)
def test_a_file_beside_the_shards_needs_no_picture(coco, finished, copy, make, refined, name, damage, mend):
  damage(copy / name)
  with pytest.raises(UserError):
    RecordDirectory(copy)
  mend(make(coco, copy))
  assert contents(copy) == contents(finished) and refined == []


@pytest.mark.parametrize("names, again", [
    (("manifest.json", "errors.jsonl"), []),
    (("errors.jsonl", "reports.jsonl"), ["3", "4"]),  # nobody knows why 4 was skipped
    (("manifest.json", "reports.jsonl"), ["1", "2", "3", "4", "5"])])
def test_two_of_the_three_files_that_describe_shards(coco, finished, copy, make, refined, names, again):
  for name in names:
    lose(copy / name)
  run.export(make(coco, copy))
  assert contents(copy) == contents(finished) and refined == again


@pytest.mark.parametrize("mend, damage, suffix", [
    (repair, flip, ""), (repair, lose, ""), (repair, cut, ""), (repair, flip, ".index"),
    (run.export, lose, ""), (run.export, cut, ""), (run.export, flip, ".index"), (run.export, lose, ".index")])
@pytest.mark.parametrize("also", [None, "manifest.json", "errors.jsonl", "reports.jsonl"])
def test_one_shard_is_made_again(coco, finished, copy, make, refined, mend, damage, suffix, also):
  damage(copy / (SHARD.format(0) + suffix))
  if also:
    lose(copy / also)
  mend(make(coco, copy))
  assert contents(copy) == contents(finished) and refined == ["1", "2"]


def test_everything_beside_the_shards_is_lost(coco, finished, copy, make, refined):
  for name in BESIDE:
    lose(copy / name)
  repair(make(coco, copy))
  assert contents(copy) == contents(finished) and len(refined) == 5


def test_a_whole_directory_is_left_alone(coco, finished, copy, make, refined, capsys):
  repair(make(coco, copy))
  assert "is complete already" in capsys.readouterr().out
  assert contents(copy) == contents(finished) and refined == []


def test_a_directory_of_before_there_were_checksums(coco, finished, copy, make, refined):
  """It opens, a lost shard is made again, and a damaged shard too."""
  for name in "manifest.json", "export_config.json":
    fields = json.loads((copy / name).read_text())
    del fields["checksum"]
    if name == "manifest.json":
      del fields["files"]
      for shard in fields["shards"]:
        del shard["index_sha256"], shard["made_of"]
    (copy / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
  (copy / "reports.jsonl").unlink()
  assert len(RecordDirectory(copy)) == 4
  flip(copy / SHARD.format(0))
  repair(make(coco, copy))
  names = [SHARD.format(number) + suffix for number in range(3) for suffix in ("", ".index")]
  assert {name: contents(copy)[name] for name in names} == {name: contents(finished)[name] for name in names}
  assert refined == ["1", "2"] and len(RecordDirectory(copy)) == 4


def test_a_damaged_configuration_is_not_that_of_another_export(coco, copy, make):
  """Without the manifest, shards of another configuration are not taken for those of this one."""
  flip(copy / "export_config.json")
  with pytest.raises(UserError, match="holds records of unknown origin"):
    run.export(make(coco, copy, image=ImageSettings(max_side=64)))
  lose(copy / "manifest.json")
  config = make(coco, copy, image=ImageSettings(max_side=64))
  run.export(config)
  assert {picture.width for picture in (RecordDirectory(copy)[k].picture for k in range(4))} == {64}


def test_an_unfinished_export_is_finished(coco, finished, tmp_path, make, refined):
  output = tmp_path / "out"
  run.export(make(coco, output), run.ShardRange(0, 2))
  flip(output / SHARD.format(1))
  flip(next(output.glob(".report*00000-of*")))
  refined.clear()
  repair(make(coco, output))
  assert contents(output) == contents(finished) and refined == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("operation", range(0, 36, 3))
def test_a_full_disk_at_any_moment(coco, finished, tmp_path, make, monkeypatch, operation):
  """A write that fails ends the export with one line; with room again it goes on to the same bytes."""
  left, config = operation, make(coco, tmp_path / "out")
  path_class = type(epath.Path(config.output))

  def counted(method):
    original = getattr(path_class, method)

    def step(path, *arguments, **options):
      nonlocal left
      writes = method != "open" or arguments[:1] == ("wb",)
      left -= writes
      if writes and left < 0:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
      return original(path, *arguments, **options)

    return step

  with monkeypatch.context() as patch:
    for method in "open", "write_bytes", "replace", "mkdir":
      patch.setattr(path_class, method, counted(method))
    with pytest.raises(UserError, match=r"^[^\n]*cannot be written \(No space left on device: [^\n]*$"):
      run.export(config)
  run.export(config)
  assert contents(tmp_path / "out") == contents(finished)
