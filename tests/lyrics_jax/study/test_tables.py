"""Estimates over seeds, tables, kinds of questions, rows and their sharing of runs."""

import dataclasses

import numpy as np
import pytest

from lyrics_jax.data.pictures import PictureInputs
from lyrics_jax.evaluation.questions import Question
from lyrics_jax.study import kinds, report
from lyrics_jax.study.places import Places
from lyrics_jax.study.presets import PRESETS
from lyrics_jax.study.rows import ROWS, find_row
from lyrics_jax.study.runs import Runs
from lyrics_jax.study.study import Result
from lyrics_jax.study.table import Estimate, markdown
from refiner_export.common.settings import UserError
from refiner_export.pages import bars


def test_the_interval_is_students():
  estimate = Estimate.of([0.5, 0.6, 0.7])
  assert estimate.mean == pytest.approx(0.6) and estimate.seeds == 3
  assert estimate.half == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-4)  # t of 2 degrees of freedom
  assert estimate.percent() == "60.0 ± 24.8"
  assert Estimate.of([0.25]) == Estimate(0.25, None, 1) and Estimate.of([0.25]).percent() == "25.0"


def test_the_interval_covers_the_truth_as_often_as_it_says():
  rng, covered = np.random.default_rng(0), 0
  for _ in range(2000):
    estimate = Estimate.of(rng.normal(0.3, 0.1, 3))
    covered += abs(estimate.mean - 0.3) <= estimate.half
  assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_table():
  estimates = {"full": {"test/rec": Estimate(0.5, 0.01, 3), "test/count": Estimate(1.0, 0.0, 3)},
               "lora": {"test/rec": Estimate(0.25, None, 1)}, "blind": {"held_out/rec": Estimate(0.1, None, 1)}}
  about = {"full": "full", "lora": "LoRA", "blind": "blind"}
  assert markdown(estimates, about, "test", {"rec": "REC", "count": "count"}, {"count": 0.4}) == [
      "|  | REC | count |", "| --- | ---: | ---: |", "| full | 50.0 ± 1.0 | 100.0 ± 0.0 |", "| LoRA | 25.0 |  |",
      "| without looking |  | 40.0 |"]


def test_estimates_group_by_row_and_figure():
  results = [Result(find_row("full"), 0, {"a": 1.0, "b": 0.0}), Result(find_row("lora"), 0, {"a": 0.5}),
             Result(find_row("full"), 1, {"a": 0.0})]
  estimates = report.estimates_of(results)
  assert list(estimates) == ["full", "lora"]
  assert estimates["full"]["a"].seeds == 2 and estimates["full"]["a"].mean == 0.5
  assert estimates["full"]["b"] == Estimate(0.0, None, 1)


@pytest.mark.parametrize("task, question, kind", [
    ("vqa", "How many red objects are there?", "count"), ("vqa", "What colour is the circle?", "colour"),
    ("vqa", "Question: What shape is the red object? Short answer:", "shape"),
    ("vqa", "Is there an orange star?", "presence"), ("vqa", "Is the star left of the circle?", "relation"),
    ("rec", "Where is the star?", "rec"), ("region", "What is at <box 0.0>?", "region")])
def test_kinds(task, question, kind):
  assert kinds.kind_of(task, question) == kind


def test_a_question_of_no_kind():
  with pytest.raises(UserError, match="'Why\\?' of task 'vqa' is of no kind"):
    kinds.kind_of("vqa", "Why?")


def test_the_commonest_answers():
  asked = []
  for answer in ("2", "2", "3"):
    asked.append(Question(0, "vqa", "How many stars are there?", answer, "text"))
  asked.append(Question(0, "rec", "Where is the star?", "<box 0.0>", "box"))
  assert kinds.commonest(asked) == {"count": 2 / 3}


def test_rows_have_names_of_their_own_and_share_the_first_equal_stage_1():
  names = [row.name for row in ROWS]
  assert len(set(names)) == len(names) and find_row("nothing") is None
  assert {row.name for row in ROWS if row.stage_1.name == "full"} == {"full", "lora", "frozen", "prompt"}
  for preset in PRESETS.values():
    assert set(preset.rows) <= set(names)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_run_of_every_row_is_a_valid_configuration(preset, row):
  runs = Runs(PRESETS[preset], Places("/out"))
  align, instruct = runs.align(row, 1), runs.instruct(row, 1)
  assert instruct.config.seed == 1 and instruct.config.output == f"/out/runs/{row.name}/1/instruct"
  assert (align is None) == (row.name == "align_0")
  pieces = {piece.pattern: piece.run for piece in instruct.pieces}
  assert pieces["vision/*"] == "/out/runs/parts/0/encoder" and pieces["llm/*"] == "/out/runs/parts/0/words"
  if align is not None:
    assert pieces["connector/*"] == align.config.output == f"/out/runs/{row.stage_1.name}/1/align"
    assert align.config.stage.model.connector == instruct.config.stage.model.connector
    assert align.config.data.blank == instruct.config.data.blank
  full = runs.instruct(find_row("full"), 1).config
  assert (instruct.config == full) == (row.name == "full")
  assert not full.stage.trains("vision/patch/kernel") and full.stage.trains("llm/words")


def test_rows_do_not_share_settings():
  runs = Runs(PRESETS["slice"], Places("/out"))
  assert runs.instruct(find_row("lora"), 0).config.stage.model.llm.lora is not None
  assert runs.instruct(find_row("full"), 0).config.stage.model.llm.lora is None
  assert PRESETS["slice"].llm.lora is None


def test_bars():
  rec = bars.Panel("REC", ("full", "blind"), (60.0, 1.0), (3.0, 0.0))
  assert bars.draw([rec, bars.Panel("count", ("full",), (80.0,), (0,))]).startswith(b"\x89PNG")


# --- what is blank ---

@pytest.mark.parametrize("blank, shown", [
    ((), {"image", "detection", "masks", "spatial"}), (("image",), {"detection", "masks", "spatial"}),
    (("detection", "spatial"), {"image", "masks"}), (("masks",), {"image", "detection", "spatial"}),
    (("detection", "masks", "spatial"), {"image"})])
def test_blank_parts_of_a_picture(make_record, blank, shown):
  run = Runs(PRESETS["slice"], Places("/out")).align(find_row("full"), 0)
  data = dataclasses.replace(run.config.data, blank=blank)
  inputs = PictureInputs(data, run.config.fields, run.config.dimensions)
  picture = make_record(0, objects=2).picture
  arrays = inputs.arrays(picture, inputs.whole(picture))
  seen = {name for name in ("image", "detection", "masks") if arrays[name].any()}
  seen |= {name for name in ("detection", "masks") if arrays[f"{name}_mask"].any()}
  if inputs.objects(picture, inputs.whole(picture)):
    seen.add("spatial")
  assert seen == shown
