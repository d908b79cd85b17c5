"""A raised limit and added units: finished shards keep their bytes, and the end is that of an export made at once."""

import json
import pathlib

import pytest
from odd_sources import Lines

from refiner_export.common.settings import UserError
from refiner_export.export import growing, run
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.verify import verify


def contents(directory):
  return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


@pytest.fixture
def lines(tmp_path):
  """Units with 3, 2 and 4 examples."""
  folder, seed = tmp_path / "lines", 0
  folder.mkdir()
  for unit, count in enumerate((3, 2, 4)):
    texts = []
    for _ in range(count):
      texts.append(json.dumps({"caption": f"caption {seed}", "pictures": [seed if seed != 4 else "no picture"]}))
      seed += 1
    (folder / f"{unit}.jsonl").write_text("\n".join(texts))
  return folder


def source_of(folder, units, known):
  """The folder's first so many units."""
  chosen = folder.parent / f"lines{units}"
  chosen.mkdir(exist_ok=True)
  for file in sorted(folder.iterdir())[:units]:
    (chosen / file.name).write_bytes(file.read_bytes())
  return Lines(str(chosen), known)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("limits", [(1, 2), (2, 5), (4, None), (5, 9), (9, None), (1, 4, 6, None), (3, 100)])
def test_a_raised_limit(lines, tmp_path, make, refined, limits, known):
  for limit in limits:
    config = make(Lines(str(lines), known), tmp_path / "grown", limit=limit)
    run.export(config)
    assert list(verify(config.output)) == []
  total = len(refined)
  run.export(make(Lines(str(lines), known), tmp_path / "once", limit=limits[-1]))
  assert contents(tmp_path / "grown") == contents(tmp_path / "once")
  if known:  # only examples of shards that a limit has cut are refined again, one each time at most
    assert total - (len(refined) - total) <= len(limits) - 1


@pytest.mark.parametrize("known, again", [(True, 4), (False, 4)])
@pytest.mark.parametrize("unfinished", [False, True])
def test_added_units(lines, tmp_path, make, refined, known, again, unfinished):
  folder = pathlib.Path(source_of(lines, 2, known).folder)
  run.export(make(Lines(str(folder), known), tmp_path / "grown"), run.ShardRange(0, 1 if unfinished else None))
  refined.clear()
  (folder / "2.jsonl").write_bytes((lines / "2.jsonl").read_bytes())
  run.export(make(Lines(str(folder), known), tmp_path / "grown"))
  assert len(refined) == again if not unfinished else len(refined) in (6, 7)
  run.export(make(Lines(str(folder), known), tmp_path / "once"))
  assert contents(tmp_path / "grown") == contents(tmp_path / "once")
  assert len(RecordDirectory(tmp_path / "grown")) == 8


@pytest.mark.parametrize("change", ["edited", "before", "lowered"])
def test_what_does_not_grow_is_refused(lines, tmp_path, make, change):
  config = make(Lines(str(lines), True), tmp_path / "out", limit=6)
  run.export(config)
  expected = contents(config.output)
  if change == "edited":
    (lines / "0.jsonl").write_text((lines / "0.jsonl").read_text() + " ")
  elif change == "before":
    (lines / "00.jsonl").write_text((lines / "0.jsonl").read_text())
  limit = 2 if change == "lowered" else 8
  with pytest.raises(UserError, match="was begun with another config.limit"):
    run.export(make(Lines(str(lines), True), tmp_path / "out", limit=limit))
  assert contents(config.output) == expected


@pytest.mark.parametrize("operation", range(12))
def test_interrupted_while_it_grows(lines, tmp_path, make, monkeypatch, operation):
  """At each of its steps; the next run goes on."""
  run.export(make(Lines(str(lines), True), tmp_path / "grown", limit=6))
  left = operation
  path_class = type(growing.make_plan(make(Lines(str(lines), True), tmp_path / "grown")).directory)

  def counted(method):
    original = getattr(path_class, method)

    def step(*arguments, **options):
      nonlocal left
      left -= 1
      if left < 0:
        raise KeyboardInterrupt
      return original(*arguments, **options)

    return step

  with monkeypatch.context() as patch:
    for method in "replace", "unlink":
      patch.setattr(path_class, method, counted(method))
    with pytest.raises(KeyboardInterrupt):
      run.export(make(Lines(str(lines), True), tmp_path / "grown"))
  run.export(make(Lines(str(lines), True), tmp_path / "grown"))
  run.export(make(Lines(str(lines), True), tmp_path / "once"))
  # This process lives on, so its unfinished files count as being written.
  grown = {name: data for name, data in contents(tmp_path / "grown").items() if not name.startswith(".unfinished.")}
  assert grown == contents(tmp_path / "once")
