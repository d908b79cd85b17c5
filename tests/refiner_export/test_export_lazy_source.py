"""Sources of many units: how shards follow from them, and that they are read only when their turn comes."""

import json
import pathlib
import time
import tracemalloc

import pytest
from odd_sources import EXAMPLES, Billion, Lines, Twins, WrongCount

from refiner_export.common.settings import UserError
from refiner_export.export import pipeline
from refiner_export.export.config import RunnerSettings
from refiner_export.export.plan import read_plan
from refiner_export.export.run import ShardRange, export
from refiner_export.records.formats import open_shard
from refiner_export.records.reader import RecordDirectory


def contents(directory):
  """File name -> bytes, hidden files included."""
  return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


def write_lines(folder, units) -> Lines:
  """`units` are lists of the examples' pictures."""
  folder.mkdir(parents=True, exist_ok=True)
  for number, examples in enumerate(units):
    lines = [json.dumps({"caption": f"caption {k} of unit {number}", "pictures": pictures})
             for k, pictures in enumerate(examples)]
    (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n" * bool(lines))
  return Lines(str(folder))


UNITS = [[[1], [2, 3], []], [[4]], [], [["no picture"], [5, "no picture"], [6]]]


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Lines:
  """Units of 3, 1, 0 and 3 examples with one, several or no pictures; two examples have a picture that is none."""
  return write_lines(tmp_path_factory.mktemp("lines"), UNITS)


@pytest.fixture(scope="module")
def reference(lines, make, tmp_path_factory):
  output = tmp_path_factory.mktemp("reference") / "records"
  export(make(lines, output))
  return output


def test_a_unit_of_unknown_size_is_one_shard(reference):
  directory = RecordDirectory(reference)
  manifest = directory.manifest
  assert [shard.records for shard in manifest.shards] == [3, 1, 0, 1]
  assert [shard.skipped for shard in manifest.shards] == [0, 0, 0, 2] and manifest.skipped == 2
  assert (manifest.records, manifest.pictures, manifest.conversations, manifest.detection_rows) == (5, 5, 5, 16)
  records = [directory[k] for k in range(len(directory))]
  assert [len(record.pictures) for record in records] == [1, 2, 0, 1, 1]
  assert records[1].id == "0.jsonl/1" and records[1].captions == ("caption 1 of unit 0",)
  errors = [json.loads(line) for line in (reference / "errors.jsonl").read_text().splitlines()]
  assert [error["id"] for error in errors] == ["3.jsonl/0", "3.jsonl/1"]


def test_units_of_known_size_are_cut(lines, tmp_path, make):
  config = make(Lines(lines.folder, known=True), tmp_path / "out", records_per_shard=2)
  plan = read_plan(config)
  slices = [plan.slice_of(number) for number in range(plan.shards)]
  assert [(part.unit.name[0], part.start, part.stop) for part in slices] == [
      ("0", 0, 2), ("0", 2, 3), ("1", 0, 1), ("3", 0, 2), ("3", 2, 3)]
  manifest = export(config)
  assert [(shard.records, shard.skipped) for shard in manifest.shards] == [(2, 0), (1, 0), (1, 0), (0, 2), (1, 0)]


def test_workers_and_ranges_give_the_same_bytes(lines, reference, tmp_path, make):
  export(make(lines, tmp_path / "workers", runner=RunnerSettings(workers=2)))
  assert contents(tmp_path / "workers") == contents(reference)
  config = make(lines, tmp_path / "ranges", batch=1)
  for text in "3:", "0:1", "1:3":
    export(config, ShardRange.parse(text))
  assert contents(tmp_path / "ranges") == contents(reference)


@pytest.mark.parametrize("examples", range(1, 7))
def test_a_stopped_export_goes_on(lines, reference, tmp_path, make, monkeypatch, examples):
  config, refine, seen = make(lines, tmp_path / "out", batch=1), pipeline.refine_read, []

  def stopped(batch, *arguments):
    if len(seen) == examples:
      raise KeyboardInterrupt
    seen.extend(batch)
    return refine(batch, *arguments)

  monkeypatch.setattr(pipeline, "refine_read", stopped)
  with pytest.raises(KeyboardInterrupt):
    export(config)
  monkeypatch.setattr(pipeline, "refine_read", refine)
  export(config)
  assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.parametrize("lost", range(4))
def test_a_lost_shard_of_a_complete_export_is_made_again(lines, reference, tmp_path, make, lost):
  """Its skipped examples are known from the manifest and `errors.jsonl`, without reading the source."""
  config = make(lines, tmp_path / "out")
  manifest = export(config)
  (tmp_path / "out" / manifest.shards[lost].file).unlink()
  export(config)
  assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("limit, counts", [(1, [1]), (3, [3]), (4, [3, 1]), (6, [3, 1, 0, 2]), (99, [3, 1, 0, 3])])
def test_a_limit_counts_over_units(lines, tmp_path, make, known, limit, counts):
  config = make(Lines(lines.folder, known), tmp_path / "out", limit=limit)
  assert read_plan(config).counts == counts
  manifest = export(config)
  assert manifest.records + manifest.skipped == sum(counts)


def test_an_edited_source_is_refused(tmp_path, make):
  source, output = write_lines(tmp_path / "lines", UNITS), tmp_path / "out"
  config = make(source, output)
  manifest = export(config)
  file = tmp_path / "lines" / "0.jsonl"
  text = file.read_text()
  file.write_text(text.replace("caption 1", "caption one"))  # its size, which the source gives as version, differs
  with pytest.raises(UserError, match=f"^{output} was begun with another config.source: "):
    export(config)
  # Texts that differ though the version is the same are noticed when the unit is read again.
  file.write_text(text.replace("caption 1", "caption 7"))
  export(config)
  (output / manifest.shards[0].file).unlink()
  before = contents(output)
  with pytest.raises(UserError, match=f"^{output}: the source's texts or annotations of {manifest.shards[0].file} are "
                                      "not those of before .*: restore the source, or remove the directory$"):
    export(config)
  assert contents(output) == before
  file.write_text(text)
  assert export(config) == manifest


@pytest.mark.parametrize("count, message", [
    (2, "unit unit holds more than its count of 2 examples: mend the source's method shards"),
    (4, "unit unit gives 1 examples after example 2, and its count of 4 makes it 2: mend the source's method shards")])
def test_wrong_counts_are_noticed(tmp_path, make, count, message):
  assert export(make(WrongCount(), tmp_path / "right")).records == 3
  with pytest.raises(UserError, match=f"^source: {message}"):
    export(make(WrongCount(count), tmp_path / "out"))
  assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_source_without_examples(tmp_path, make):
  (tmp_path / "none").mkdir()
  for name, source in ("none", Lines(str(tmp_path / "none"))), ("empty", write_lines(tmp_path / "empty", [[], []])):
    with pytest.raises(UserError, match="^config.source: there is no example in it$"):
      export(make(source, tmp_path / f"{name} out"))


def test_two_units_of_one_name(tmp_path, make):
  with pytest.raises(UserError, match="^config.source: two of its units have the same name"):
    export(make(Twins(), tmp_path / "out"))


def test_a_source_of_a_billion_pictures_is_planned_at_once(tmp_path, make):
  config = make(Billion(), tmp_path / "out", records_per_shard=1000, batch=100)
  tracemalloc.start()
  begun = time.process_time()
  plan = read_plan(config)
  seconds = time.process_time() - begun
  memory = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert plan.shards == EXAMPLES // 1000 and memory < 100 * 2**20
  assert seconds < 10  # about one, on a machine that has nothing else to do
  part = plan.slice_of(654_321)
  assert (part.unit.name, part.start, part.stop) == ("65432.tar", 1000, 2000)


def test_one_shard_of_a_billion_pictures_is_exported(tmp_path, make, capsys):
  output = tmp_path / "out"
  begun = time.process_time()
  config = make(Billion(), output, records_per_shard=1000, batch=50)
  assert export(config, ShardRange(654_321, 654_322)) is None
  assert time.process_time() - begun < 60
  assert capsys.readouterr().out.splitlines()[-1].endswith("; 999999 of 1000000 are still to be made")
  assert len(open_shard(output / "lyrics_records-train.tfrecord-0654321-of-1000000")) == 1000
