"""LLaMA equals Hugging Face's; with a cache it says what it says without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from lyrics_jax.config import LLMConfig, LoRAConfig
from lyrics_jax.models.decode import greedy
from lyrics_jax.models.llama import LLaMA
from lyrics_jax.stages.instruct import causal_mask

MODULES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
           "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
           "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
BATCH, LENGTH = 3, 7
VALID = np.arange(LENGTH) < np.array([[7], [5], [3]])
IDS = np.random.default_rng(0).integers(0, 50, (BATCH, LENGTH)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), IDS.shape)


@dataclasses.dataclass
class Case:
  theirs: transformers.LlamaForCausalLM
  graph: nnx.GraphDef
  state: nnx.State

  @property
  def ours(self) -> LLaMA:
    return nnx.merge(self.graph, self.state)


@pytest.fixture(scope="module", params=[4, 2, 1], ids=lambda n: f"kv_heads{n}")
def case(request):
  torch.manual_seed(0)
  theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
      num_key_value_heads=request.param, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0,
      tie_word_embeddings=False)).eval()
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
  config = LLMConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=request.param, mlp_dim=48, train="full")
  graph, state = nnx.split(LLaMA(config, rngs=nnx.Rngs(0)))

  def copied(path):
    if path[0] != "stack":
      module = {"words": theirs.model.embed_tokens, "norm": theirs.model.norm, "head": theirs.lm_head}[path[0]]
      weight = module.weight.T if path[0] == "head" else module.weight
    else:
      weights = [layer.get_submodule(MODULES[path[2]]).weight for layer in theirs.model.layers]
      weight = torch.stack([weight.T if path[3] == "kernel" else weight for weight in weights])
    return jnp.asarray(weight.detach().numpy())

  return Case(theirs, graph, nnx.from_flat_state([(path, v.replace(copied(path))) for path, v in nnx.to_flat_state(state)]))


@pytest.fixture(scope="module")
def logits(case):
  """Ours, without a cache."""
  @jax.jit
  def run(state):
    model = nnx.merge(case.graph, state)
    return model.logits(model(model.words(IDS), POSITIONS, causal_mask(jnp.asarray(VALID)))[0])

  return np.asarray(run(case.state))


def test_equals_hugging_face(case, logits):
  with torch.no_grad():
    theirs = case.theirs(torch.tensor(IDS).long(), attention_mask=torch.tensor(VALID).long()).logits.numpy()
  np.testing.assert_allclose(logits[VALID], theirs[VALID], atol=1e-4, rtol=1e-4)  # float32 in both; logits of size 10


def test_a_cache_changes_nothing(case, logits):
  """Four tokens at once, then one by one, into a cache with slots to spare; the padding of a row is at its end."""
  model, slots, first = case.ours, 9, 4
  order = jnp.arange(slots)
  seen = lambda rows: ((order[None] <= rows[:, None])[None, None] & jnp.pad(VALID, ((0, 0), (0, slots - LENGTH)))[:, None, None, :])
  step = jax.jit(lambda state, ids, positions, mask, cache, slot: (lambda m: (lambda h, c: (m.logits(h), c))(
      *m(m.words(ids), positions, mask, cache=cache, slot=slot)))(nnx.merge(case.graph, state)))
  cache = model.empty_cache(BATCH, slots, jnp.float32)
  said = []
  for start, end in [(0, first), *((t, t + 1) for t in range(first, LENGTH))]:
    rows = jnp.arange(start, end)
    out, cache = step(case.state, IDS[:, start:end], POSITIONS[:, start:end], seen(rows), cache, start)
    said.append(np.asarray(out))
  np.testing.assert_allclose(np.concatenate(said, axis=1)[VALID], logits[VALID], atol=1e-5, rtol=1e-5)  # the same sums, padded


def test_greedy_decoding_equals_hugging_face(case):
  """Each prompt's continuation, padding and all, is the one that Hugging Face finds for the prompt alone; after `eos`, `eos`."""
  new = 6
  prompts = [IDS[b, :VALID[b].sum()] for b in range(BATCH)]
  alone = []
  for prompt in prompts:
    ids = torch.tensor(prompt)[None].long()
    for _ in range(new):
      with torch.no_grad():
        ids = torch.cat([ids, case.theirs(ids).logits[:, -1:].argmax(-1)], dim=1)
    alone.append(ids[0, len(prompt):].tolist())
  eos = alone[1][2]  # so that the rows end at different times
  ended = [row[:row.index(eos)] + [eos] * (new - row.index(eos)) if eos in row else row for row in alone]
  decoded = jax.jit(lambda state: (lambda m: greedy(m, m.words(IDS), jnp.asarray(VALID), new, eos))(nnx.merge(case.graph, state)))
  assert np.asarray(decoded(case.state)).tolist() == ended


def make_lora(train, **lora):
  config = LLMConfig(vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, train=train, lora=LoRAConfig(**lora))
  graph, state = nnx.split(LLaMA(config, rngs=nnx.Rngs(0)))
  return graph, {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def run_lora(graph, variables, values, key=None):
  state = nnx.from_flat_state([(tuple(path.split("/")), variable.replace(jnp.asarray(values[path])))
                               for path, variable in variables.items()])
  model = nnx.merge(graph, state)
  return np.asarray(model.logits(model(model.words(IDS), POSITIONS, causal_mask(jnp.asarray(VALID)), key=key)[0]))


TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("targets", [("q", "v"), TARGETS], ids=["q-v", "all"])
def test_lora_adds_a_scaled_product(targets):
  rng = np.random.default_rng(0)
  graph, variables = make_lora("lora", rank=3, alpha=12.0, targets=targets)
  base_graph, base_variables = make_lora("full")
  values = {path: np.asarray(variable[...]) for path, variable in variables.items()}
  base = {path: value for path, value in values.items() if "/lora_" not in path}
  assert base.keys() == base_variables.keys()
  added = {path.split("/")[2] for path in values if "/lora_" in path}
  assert added == set(targets) and all(not values[path].any() for path in values if path.endswith("/lora_b"))
  fresh = run_lora(graph, variables, values)
  np.testing.assert_array_equal(fresh, run_lora(base_graph, base_variables, base))  # B = 0 adds exactly nothing

  for path in values:
    if "/lora_" in path:
      values[path] = 0.1 * rng.standard_normal(values[path].shape).astype(np.float32)
  merged = {path: value + 12.0 / 3 * (values[path.replace("kernel", "lora_a")] @ values[path.replace("kernel", "lora_b")])
            if path.replace("kernel", "lora_a") in values and path.endswith("kernel") else value for path, value in base.items()}
  adapted = run_lora(graph, variables, values)
  np.testing.assert_allclose(adapted, run_lora(base_graph, base_variables, merged), atol=1e-5)  # x(W+AB) against xW+xAB, float32
  assert np.abs(adapted - fresh).max() > 0.01


def test_lora_dropout_needs_a_key():
  graph, variables = make_lora("lora", rank=3, dropout=0.5)
  values = {path: np.asarray(variable[...]) + (0.1 if path.endswith("/lora_b") else 0) for path, variable in variables.items()}
  still = run_lora(graph, variables, values)
  np.testing.assert_array_equal(still, run_lora(graph, variables, values))
  shaken = run_lora(graph, variables, values, jax.random.key(0))
  assert not np.allclose(still, shaken) and not np.allclose(shaken, run_lora(graph, variables, values, jax.random.key(1)))
