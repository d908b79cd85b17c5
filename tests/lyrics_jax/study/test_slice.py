"""The smallest form of the study from start to end: what it writes, that it goes on, and that it repeats itself."""

import json
import math

import pytest

from lyrics_jax.study import study as study_module
from lyrics_jax.study.__main__ import main
from lyrics_jax.study.kinds import KINDS
from refiner_export.common.settings import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  output = tmp_path_factory.mktemp("study")
  main("slice", str(output))
  return output


def read(output):
  return json.loads((output / "study.json").read_text())


@pytest.mark.slow
def test_tables_figures_and_plots(made):
  content = read(made)
  assert list(content["rows"]) == ["full", "frozen"] and [run["seed"] for run in content["runs"]] == [0, 0]
  full = content["runs"][0]["figures"]
  for split in "test", "held_out":
    for name in (*KINDS, "rec_iou", "i2t_r1", "t2i_r1", "itm_visual", "itm_grounding", "msp_tags", "msp_digits"):
      assert 0 <= full[f"{split}/{name}"] <= 1
    assert content["without_looking"][split]["relation"] == content["without_looking"][split]["presence"] == 0.5
  for name in "itc", "itm", "icg", "msp", "lm", "soft_token_spread":
    assert math.isfinite(full[f"train/{name}"])
  frozen = content["runs"][1]["figures"]
  assert frozen["test/itm_visual"] == full["test/itm_visual"]  # stage 1 is shared
  assert frozen["train/lm"] != full["train/lm"]
  text = (made / "tables.md").read_text()
  assert text.count("| full |") == 4 and text.count("| language model: frozen |") == 4
  for name in "rows.png", "losses_align.png", "losses_instruct.png":
    assert (made / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(made, monkeypatch):
  before = read(made)

  def refuse(*_):
    raise AssertionError("trained again")

  monkeypatch.setattr(study_module, "train", refuse)
  main("slice", str(made))
  assert read(made) == before


@pytest.mark.slow
def test_the_same_figures_after_a_row_is_lost(made):
  before = read(made)
  for name in "figures.json", "metrics.jsonl":
    (made / "runs/full/0/instruct" / name).unlink()
  (made / "runs/full/0/instruct").rename(made / "elsewhere")
  main("slice", str(made))
  after = read(made)
  for name, value in before["runs"][0]["figures"].items():
    assert after["runs"][0]["figures"][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.slow
def test_another_preset_in_the_same_directory_is_refused(made, monkeypatch):
  monkeypatch.setattr(study_module, "make_world", lambda *_: None)
  with pytest.raises(UserError, match="was made with other settings: name another --output, or remove it"):
    main("small", str(made))


def test_an_unknown_row(tmp_path):
  with pytest.raises(UserError, match="--row=all: there is no such row; the rows are full, no_vit"):
    main("slice", str(tmp_path), row=("all",))
