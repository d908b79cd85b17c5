"""Adapters equal PEFT's on any set of projections, in what they say and in what they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from hugging_face import MODULES, as_ours, make_llama, state_of, tensors_at

from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.models.llm.llama import Llama

RANK, ALPHA = 3, 12.0
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
BATCH, LENGTH = 3, 7
SEGMENTS = (np.arange(LENGTH) < np.array([[7], [5], [3]])).astype(np.int32)
IDS = np.random.default_rng(0).integers(0, 50, (BATCH, LENGTH)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), IDS.shape)


def make(adapted=True, **lora):
  lora = LoRASettings(**{"rank": RANK, "alpha": ALPHA, "dropout": 0.0, **lora}) if adapted else None
  config = LlamaSettings(vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, lora=lora)
  return nnx.split(Llama(config, rngs=nnx.Rngs(0)))


def logits(graph, state, key=None):
  model = nnx.merge(graph, state)
  return model.logits(model(model.words(IDS), POSITIONS, SEGMENTS, key=key)[0])


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "down"), TARGETS], ids="-".join)
def test_equals_peft(targets):
  theirs = make_llama(layers=2, kv_heads=2, spread=0.1)
  modules = [MODULES[name].split(".")[1] for name in targets]
  peft.inject_adapter_in_model(
      peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=modules), theirs)
  for name, parameter in theirs.named_parameters():
    if "lora_" in name:
      torch.nn.init.normal_(parameter, std=0.1)
  graph, state = make(targets=targets)
  state = state_of(theirs, state)
  adapters = {path for path, _ in nnx.to_flat_state(state) if path[-1].startswith("lora_")}
  assert {path[2] for path in adapters} == set(targets) and len(adapters) == 2 * len(targets)

  weights = np.random.default_rng(1).standard_normal((BATCH, LENGTH, 50)).astype(np.float32) * SEGMENTS[..., None]
  said = theirs(torch.tensor(IDS).long(), attention_mask=torch.tensor(SEGMENTS)).logits
  (said * torch.tensor(weights)).sum().backward()
  trained, frozen = nnx.split_state(state, lambda path, _: path in adapters, ...)

  @jax.jit
  def run(trained):
    out, pullback = jax.vjp(lambda trained: logits(graph, nnx.merge_state(trained, frozen)), trained)
    return out, pullback(jnp.asarray(weights))[0]

  out, gradients = run(trained)
  base_graph, base = make(adapted=False)
  assert np.abs(out - logits(base_graph, state_of(theirs, base))).max() > 0.01  # the adapters are not nothing
  real = SEGMENTS > 0
  np.testing.assert_allclose(out[real], said.detach().numpy()[real], atol=1e-5, rtol=1e-5)  # float32 in both
  for path, gradient in nnx.to_flat_state(gradients):
    expected = as_ours(path, [tensor.grad for tensor in tensors_at(path, theirs)])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradient[...], expected, atol=1e-5 * scale, rtol=1e-5, err_msg="/".join(path))


def test_fresh_adapters_add_exactly_nothing():
  graph, state = make(targets=TARGETS)
  base_graph, _ = make(adapted=False)
  flat = nnx.to_flat_state(state)
  assert all(not np.asarray(variable[...]).any() for path, variable in flat if path[-1] == "lora_b")
  base = nnx.from_flat_state([(path, variable) for path, variable in flat if not path[-1].startswith("lora_")])
  np.testing.assert_array_equal(logits(graph, state), logits(base_graph, base))


def test_dropout_needs_a_key():
  graph, state = make(dropout=0.5)
  state = jax.tree.map(lambda a: a + 0.1, state)  # B is not zero
  run = jax.jit(lambda state, key: logits(graph, state, key))
  still, shaken, again, otherwise = (run(state, key) for key in (None, *map(jax.random.key, (0, 0, 1))))
  np.testing.assert_array_equal(shaken, again)
  assert not np.allclose(still, shaken) and not np.allclose(shaken, otherwise)
