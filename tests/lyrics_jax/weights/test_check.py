"""`compare` finds both models alike, says so by part, and tells what is not alike."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from saved_run import make_run_config, save_run

from lyrics_jax.weights.check import compare
from lyrics_jax.weights.to_hf import export
from refiner_export.common.settings import UserError

PARTS = {"align": ["vision", "mq-former", "itc", "itm", "icg", "msp"],
         "instruct": ["vision", "mq-former", "projection", "llm logits"]}


@pytest.fixture(scope="module")
def runs(tokenizer_directory, tmp_path_factory):
  """By stage: (run, exported directory). Stage 2 has LoRA and is trained in bfloat16; "adapter" is the same run."""
  folder, made = tmp_path_factory.mktemp("runs"), {}
  for stage, changes in (("align", {}), ("instruct", {"compute__dtype": "bfloat16"})):
    config = make_run_config(stage, folder / stage, tokenizer_directory, **changes)
    save_run(config)
    made[stage] = config.output, str(folder / f"{stage}_hf")
    export(*made[stage])
  export(made["instruct"][0], str(folder / "adapter_hf"), lora="adapter")
  return made | {"adapter": (made["instruct"][0], str(folder / "adapter_hf"))}


@pytest.mark.parametrize("stage", PARTS)
def test_both_are_alike(runs, stage, capsys):
  differences = compare(*runs[stage])
  assert list(differences) == PARTS[stage]
  assert max(differences.values()) < 1e-4  # float32 in both, whatever the run trains in
  printed = capsys.readouterr().out.splitlines()
  assert [line[:16].strip() for line in printed] == ["part", *PARTS[stage]]
  assert f"{differences['mq-former']:.2e}" in printed[2]


def test_what_differs_and_what_is_not_there(runs, tmp_path, capsys):
  run, directory = runs["adapter"]
  tensors = load_file(f"{directory}/model.safetensors")
  tensors["projection.bias"] = tensors["projection.bias"] + np.float32(0.5)
  save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
  shutil.copy(f"{directory}/config.json", tmp_path)
  differences = compare(run, str(tmp_path))
  assert list(differences) == PARTS["instruct"][:-1]
  assert differences["projection"] == pytest.approx(0.5, abs=1e-4)
  assert differences["vision"] < 1e-4 and differences["mq-former"] < 1e-4
  assert capsys.readouterr().out.splitlines()[-1].split() == ["llm", "logits", "not", "in", "the", "directory"]


BIAS = "projection.bias"
FAULTS = {
    "a truncated file": "is not a whole .safetensors file",
    "no weights": "has no weights in it",
    "a missing tensor": f"tensor {BIAS} is missing",
    "an unexpected tensor": "unexpected tensor extra (1 in all)",
    "a wrong shape": f"tensor {BIAS} has shape (3,)",
    "a damaged config.json": "is not JSON",
}


def spoil(directory, fault: str) -> None:
  weights = directory / "model.safetensors"
  tensors = load_file(weights)
  if fault == "a truncated file":
    weights.write_bytes(weights.read_bytes()[:-20])
  elif fault == "no weights":
    weights.unlink()
  elif fault == "a damaged config.json":
    (directory / "config.json").write_text("{")
  else:
    if fault == "a missing tensor":
      del tensors[BIAS]
    elif fault == "an unexpected tensor":
      tensors["extra"] = np.zeros(2)
    else:
      tensors[BIAS] = np.zeros(3, np.float32)
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_directory_that_is_not_whole(runs, fault, tmp_path):
  """transformers itself would draw at random what is missing."""
  run, directory = runs["instruct"]
  shutil.copytree(directory, tmp_path / "hf")
  words = FAULTS[fault]
  spoil(tmp_path / "hf", fault)
  with pytest.raises(UserError) as error:
    compare(run, str(tmp_path / "hf"))
  assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_mistakes(runs, tmp_path):
  with pytest.raises(UserError, match="/nowhere is not a Hugging Face directory"):
    compare(runs["align"][0], "/nowhere")
  message = "holds a LyricsForConditionalGeneration, but .*align is written as a LyricsForAlignment"
  with pytest.raises(UserError, match=message):
    compare(runs["align"][0], runs["instruct"][1])
  (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
  with pytest.raises(UserError, match="holds a LlamaForCausalLM, expected one of LyricsForAlignment, "):
    compare(runs["align"][0], str(tmp_path))
