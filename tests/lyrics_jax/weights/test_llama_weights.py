"""LLaMA from Hugging Face directories: every tensor has its place, and the model gives what theirs gives."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
import torch
from etils import epath
from flax import nnx
from loaded import built, values_of
from published import llama, save_bin

from lyrics_jax.weights import llama_names
from lyrics_jax.weights.table import UNKNOWN
from lyrics_jax.models.llm.llama import Llama
from refiner_export.common.settings import UserError

TOLERANCE = 1e-4  # float32 in both, summed in another order


@pytest.fixture(scope="module")
def config():
  return small.make_config("instruct", llm__heads=4, llm__kv_heads=2)


@pytest.fixture(scope="module")
def shapes(config):
  return tiny.make_plan(config).shapes


@pytest.fixture(scope="module")
def theirs(config):
  return llama(config)


def save(model, path, layout: str) -> None:
  """As one file or in shards, by transformers or as transformers saved before safetensors."""
  if "bin" in layout:
    save_bin(model, path, shards=3 if "shards" in layout else 1)
  else:
    model.save_pretrained(path, max_shard_size="10KB" if "shards" in layout else "1GB")


@pytest.fixture(scope="module")
def ours(config):
  """Logits of the model with these values, without adapters."""
  llm = dataclasses.replace(config.stage.model.llm, lora=None)

  def make():
    return Llama(llm, rngs=nnx.Rngs(0))

  graph, _ = nnx.split(nnx.eval_shape(make))

  @jax.jit
  def run(state, ids):
    model = nnx.merge(graph, state)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = model(model.words(ids), positions, jnp.ones(ids.shape, jnp.int32))
    return model.logits(hidden)

  return lambda values, ids: run(built(make, values, "llm")[1], ids)


@pytest.mark.parametrize("layout", ["one file", "shards", "bin", "bin shards"])
def test_equals_llama(layout, config, shapes, theirs, ours, tmp_path):
  save(theirs, tmp_path, layout)
  assert len(list(tmp_path.glob("*.index.json"))) == ("shards" in layout)
  source = llama_names.find(epath.Path(tmp_path), config.stage.model, shapes)
  assert not source.left_over
  assert {path for path in shapes if path.startswith("llm/")} - set(source.entries) == {
      f"llm/stack/blocks/{name}/{leaf}" for name in "qv" for leaf in ("lora_a", "lora_b")}
  ids = np.random.default_rng(0).integers(0, config.stage.model.llm.vocab_size, (2, 7))
  with torch.no_grad():
    expected = theirs(torch.tensor(ids)).logits.numpy()
  difference = np.abs(ours(values_of(source), ids) - expected).max()
  print(f"largest difference: {difference:.1e}")
  assert difference < TOLERANCE


def test_rotary_frequencies_are_left_over_and_a_tied_head_is_the_words(config, shapes, theirs, tmp_path):
  state = theirs.state_dict()
  del state["lm_head.weight"]
  torch.save(state | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(2) for n in range(2)},
             tmp_path / "pytorch_model.bin")
  (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
  source = llama_names.find(epath.Path(tmp_path), config.stage.model, shapes)
  assert set(source.left_over) == {"rotary frequencies, computed here"} and UNKNOWN not in source.left_over
  np.testing.assert_array_equal(source.read("llm/head/kernel"), state["model.embed_tokens.weight"].numpy().T)
  (tmp_path / "config.json").unlink()
  with pytest.raises(UserError, match="tensor lm_head.weight is missing"):
    llama_names.find(epath.Path(tmp_path), config.stage.model, shapes)


@pytest.mark.parametrize("change, words", [
    ({"llm__vocab_size": 49},
     "vocab_size is 48, config.stage.model.llm.vocab_size=49; set config.stage.model.llm.vocab_size=48"),
    ({"llm__rope_theta": 5e5}, "rope_theta is 10000.0, config.stage.model.llm.rope_theta=500000.0"),
    ({"llm__layers": 1}, "num_hidden_layers is 2, config.stage.model.llm.layers=1"),
    ({"stage": "align"}, "this model has no language model"),
])
def test_another_size(change, words, theirs, tmp_path):
  theirs.save_pretrained(tmp_path)
  other = small.make_config(change.pop("stage", "instruct"), **({"llm__heads": 4, "llm__kv_heads": 2} | change))
  with pytest.raises(UserError) as error:
    llama_names.find(epath.Path(tmp_path), other.stage.model, tiny.make_plan(other).shapes)
  assert words in str(error.value)


def test_more_layers_than_the_configuration_without_a_config(config, theirs, tmp_path):
  torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
  other = small.make_config("instruct", llm__heads=4, llm__kv_heads=2, llm__layers=1)
  source = llama_names.find(epath.Path(tmp_path), other.stage.model, tiny.make_plan(other).shapes)
  assert len(source.left_over[UNKNOWN]) == 9  # which `from_hf.convert` refuses
