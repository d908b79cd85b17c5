"""JAX -> Hugging Face -> JAX: an exported directory, converted back, has every parameter bit by bit."""

import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file
from saved_run import make_run_config, save_run, stored

from lyrics_jax.weights.from_hf import convert
from lyrics_jax.weights.llama_names import is_lora
from lyrics_jax.weights.to_hf import export
from refiner_export.common.settings import UserError


@pytest.fixture(scope="module")
def run(tokenizer_directory, tmp_path_factory):
  """A run whose frozen parameters are in bfloat16, and its parameters."""
  config = make_run_config("instruct", tmp_path_factory.mktemp("run") / "run", tokenizer_directory,
                           compute__frozen_dtype="bfloat16")
  return config, save_run(config)


def assert_identical(got, wanted):
  assert set(got) == set(wanted)
  for path, value in wanted.items():
    assert got[path].dtype == value.dtype, path
    np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_stage_1(tokenizer_directory, tmp_path):
  config = make_run_config("align", tmp_path / "run", tokenizer_directory, compute__frozen_dtype="bfloat16")
  parameters = save_run(config)
  export(config.output, str(tmp_path / "hf"))
  convert(config, {"lyrics": str(tmp_path / "hf")}, str(tmp_path / "weights"))
  assert_identical(stored(tmp_path / "weights"), parameters)


def test_stage_2_with_its_adapter_beside_the_language_model(run, tokenizer_directory, tmp_path):
  """The language model's own weights come from where they always were: here, a run that has no adapter."""
  config, parameters = run
  plain = make_run_config("instruct", tmp_path / "plain", tokenizer_directory, compute__frozen_dtype="bfloat16",
                          **small.FROZEN)
  base = save_run(plain)
  export(plain.output, str(tmp_path / "merged"))
  export(config.output, str(tmp_path / "adapter"), lora="adapter")
  with pytest.raises(UserError, match="frozen, and no source has it: llm"):
    convert(config, {"lyrics": str(tmp_path / "adapter")}, str(tmp_path / "weights"))

  convert(plain, {"lyrics": str(tmp_path / "merged")}, str(tmp_path / "weights"))
  assert_identical(stored(tmp_path / "weights"), base)
  save_llama(tmp_path / "merged", tmp_path / "llama")
  convert(config, {"lyrics": str(tmp_path / "adapter"), "llama": str(tmp_path / "llama")}, str(tmp_path / "both"))
  expected = dict(parameters)
  for path in parameters:
    if path.startswith("llm/") and not is_lora(path):
      expected[path] = base[path]
  assert_identical(stored(tmp_path / "both"), expected)


def save_llama(exported, directory):
  """The language model of an exported directory, as LLaMA is published."""
  directory.mkdir()
  prefix = "language_model."
  save_file({name.removeprefix(prefix): tensor for name, tensor in load_file(exported / "model.safetensors").items()
             if name.startswith(prefix)}, directory / "model.safetensors")


def test_an_incomplete_one(run, tmp_path):
  config, _ = run
  export(config.output, str(tmp_path / "hf"))
  tensors = load_file(tmp_path / "hf" / "model.safetensors")
  del tensors["mq_former.queries"]
  save_file(tensors, tmp_path / "hf" / "model.safetensors")
  with pytest.raises(UserError, match="tensor mq_former.queries is missing"):
    convert(config, {"lyrics": str(tmp_path / "hf")}, str(tmp_path / "weights"))
