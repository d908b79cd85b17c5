"""The one door: what a path holds is recognised by its content, and what nobody knows is one line."""

import re

import numpy as np
import pytest
import small
import tiny
import torch
from lavis_layout import q_former
from published import llama, save_clip
from safetensors.numpy import save_file
from saved_run import make_run_config, save_run

from lyrics_jax import convert
from lyrics_jax.weights import sources
from lyrics_jax.weights.to_hf import export
from refiner_export.common.settings import UserError


@pytest.fixture(scope="module")
def config():
  return small.make_config("instruct", former__activation="gelu")


@pytest.fixture(scope="module")
def places(config, tokenizer_directory, tmp_path_factory):
  """Kind -> path, and the run from which a directory was exported."""
  folder = tmp_path_factory.mktemp("places")
  save_clip(config, folder / "clip", text=True)
  llama(config).save_pretrained(folder / "llama", max_shard_size="10KB")
  torch.save({"model": q_former(config)}, folder / "blip2.pth")
  run = make_run_config("instruct", folder / "run", tokenizer_directory)
  save_run(run)
  export(run.output, str(folder / "lyrics"))
  return {"clip": folder / "clip", "llama": folder / "llama", "blip2": folder / "blip2.pth", "run": folder / "run",
          "lyrics": folder / "lyrics"}


PARTS = {"clip": {"vision"}, "llama": {"llm"}, "blip2": {"connector"}}


@pytest.mark.parametrize("kind", PARTS)
def test_recognised_as_named(kind, config, places):
  """LLaVA's and the published Lyrics weights are recognised in the tests of their names."""
  plan = tiny.make_plan(config)
  found, named = sources.find(str(places[kind]), plan), sources.find(str(places[kind]), plan, kind, f"--{kind}")
  assert found.paths() == named.paths() and found.left_over == named.left_over
  assert {path.split("/")[0] for path in found.paths()} == PARTS[kind]


@pytest.mark.parametrize("kind", ["run", "lyrics"])
def test_a_run_and_what_was_exported_of_it(kind, places, tokenizer_directory):
  plan = tiny.make_plan(make_run_config("instruct", places["run"], tokenizer_directory))
  origin = sources.find(str(places[kind]), plan)
  lora = {path for path in plan.shapes if "/lora_" in path}
  assert set(plan.shapes) - set(origin.paths()) == (set() if kind == "run" else lora)
  assert not origin.left_over


def test_the_command_has_a_flag_for_each_kind():
  flags = {flag.name for flag in convert.FROM_HF.flags}
  assert flags == {"output"} | {kind.name for kind in sources.KINDS}


def test_what_is_not_known(config, tmp_path):
  plan = tiny.make_plan(config)
  with pytest.raises(UserError, match="config.init_from not found: .*/nowhere. Name the output directory of an"):
    sources.find(str(tmp_path / "nowhere"), plan)
  with pytest.raises(UserError, match=f"config.init_from={re.escape(str(tmp_path))} is neither a run nor weights"):
    sources.find(str(tmp_path), plan)
  save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
  kinds = "clip, llama, blip2, ziya, lyrics, llava"
  with pytest.raises(UserError, match=f"holds none of the known kinds of weights .{kinds}.") as error:
    sources.find(str(tmp_path), plan)
  assert "\n" not in str(error.value)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="no checkpoint in .*: the run was stopped before its first one"):
    sources.find(str(tmp_path), plan)
