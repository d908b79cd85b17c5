"""Layers of a checkpoint are read by themselves where they lie by themselves, and are those that were written."""

import numpy as np
import pytest
from etils import epath
from published import llama, save_clip
from saved_run import make_run_config, save_run

from lyrics_jax.weights import stream
from lyrics_jax.weights.from_hf import convert
from lyrics_jax.weights.stored import StoredParameters, StoredRun

KERNEL = "llm/stack/blocks/q/kernel"


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, slice]]:
  """What is read of checkpoints: path and layers."""
  reads, real = [], StoredParameters.read

  def counted(stored, path, index):
    reads.append((path, index[0] if index else None))
    return real(stored, path, index)

  monkeypatch.setattr(StoredParameters, "read", counted)
  return reads


def test_of_a_run(tokenizer_directory, reads, tmp_path):
  """Orbax puts all layers in one chunk, which is read once."""
  config = make_run_config("instruct", tmp_path / "run", tokenizer_directory)
  parameters, run = save_run(config), StoredRun(config.output)
  for path in (KERNEL, KERNEL.replace("kernel", "lora_a"), "vision/stack/blocks/up/bias"):
    reads.clear()
    for layer, expected in enumerate(parameters[path]):
      np.testing.assert_array_equal(run.read(path, layer), expected, err_msg=path)
    assert [path for path, _ in reads] == [path]
  for path in ("temperature", "llm/norm/scale", "connector/former/queries"):
    if path in parameters:
      np.testing.assert_array_equal(run.read(path), parameters[path], err_msg=path)
      assert run.read(path).dtype == run.dtype(path) == parameters[path].dtype


@pytest.mark.parametrize("frozen_dtype", ["float32", "int8"])
def test_lora_and_scales_of_one_layer_are_those_of_all(frozen_dtype, tokenizer_directory, tmp_path):
  config = make_run_config("instruct", tmp_path / "run", tokenizer_directory, compute__frozen_dtype=frozen_dtype)
  save_run(config)
  run = StoredRun(config.output)
  for merged in (False, True):
    whole = run.read(KERNEL, merged=merged)
    assert whole.dtype == run.dtype(KERNEL) == ("bfloat16" if frozen_dtype == "int8" else "float32")
    np.testing.assert_array_equal(np.stack([run.read(KERNEL, layer, merged) for layer in range(len(whole))]), whole)
  assert (run.read(KERNEL, merged=True) != run.read(KERNEL)).any()


def test_of_converted_weights(tokenizer_directory, reads, tmp_path, monkeypatch):
  """Each layer is a chunk, and is read by itself; with LoRA its own factors are, too."""
  monkeypatch.setattr(stream, "_CHUNK", 64 * 64 * 2)  # bytes, of one layer
  config = make_run_config("instruct", tmp_path / "unused", tokenizer_directory, compute__frozen_dtype="bfloat16",
                           llm__width=64)
  save_clip(config, tmp_path / "clip")
  model = llama(config)
  model.save_pretrained(tmp_path / "llama")
  convert(config, {kind: str(tmp_path / kind) for kind in ("clip", "llama")}, str(tmp_path / "converted"))
  run, layers = StoredRun(str(tmp_path / "converted")), len(model.model.layers)
  for layer in range(layers):
    expected = model.model.layers[layer].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(run.read(KERNEL, layer), expected.T.astype("bfloat16"))
  assert reads == [(KERNEL, slice(layer, layer + 1)) for layer in range(layers)]
  assert epath.Path(tmp_path / "converted" / "frozen" / "_METADATA").exists()
