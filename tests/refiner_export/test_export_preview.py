"""A dry run writes one page and nothing else."""

import json
import pathlib
import re

import pytest
from odd_sources import Billion, Lines

from refiner_export.common.settings import UserError
from refiner_export.export.preview import preview
from refiner_export.export.run import export
from refiner_export.records.reader import RecordDirectory


def shown(path):
  """The ids of the records on a page, and of the skipped examples."""
  found = re.findall(r'<b>([^<]*)</b>, (skipped)?', pathlib.Path(path).read_text())
  return [id for id, skipped in found if not skipped], [id for id, skipped in found if skipped]


def test_the_first_examples(coco, tmp_path, make):
  path = preview(make(coco, tmp_path / "out"), 3)
  assert shown(path) == (["1", "2", "3"], [])
  assert [file.name for file in (tmp_path / "out").iterdir()] == ["preview.html"]
  assert shown(preview(make(coco, tmp_path / "out"), 100)) == (["1", "2", "3", "5"], ["4"])
  export(make(coco, tmp_path / "out"))
  assert len(RecordDirectory(tmp_path / "out")) == 4


def test_a_preview_leaves_a_finished_export_alone(coco, finished, make, tmp_path):
  before = {path.name: path.read_bytes() for path in finished.iterdir()}
  config = make(coco, finished)
  page = preview(config, 1)
  assert {path.name: path.read_bytes() for path in finished.iterdir() if path.name != page.name} == before
  page.unlink()


def test_random_examples_of_a_billion(tmp_path, make):
  config = make(Billion(), tmp_path / "out", records_per_shard=100)
  one, again, other = shown(preview(config, 6, 1)), shown(preview(config, 6, 1)), shown(preview(config, 6, 2))
  assert one == again != other and len(set(one[0])) == 6 and max(one[0]) > "50000.tar"


def test_units_of_unknown_size(tmp_path, make):
  for unit in range(3):
    lines = [json.dumps({"caption": "a", "pictures": [unit * 10 + k]}) for k in range(4)]
    (tmp_path / f"{unit}.jsonl").write_text("\n".join(lines))
  ids, _ = shown(preview(make(Lines(str(tmp_path)), tmp_path / "out"), 5, 3))
  assert 1 <= len(set(ids)) <= 5
  assert shown(preview(make(Lines(str(tmp_path)), tmp_path / "out"), 5))[0][-1] == "1.jsonl/0"


def test_a_place_that_nobody_can_write_to(coco, tmp_path, make):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written "):
    preview(make(coco, tmp_path / "file" / "out"), 1)
