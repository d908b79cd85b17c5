"""LLaMA equals Hugging Face's; with a cache it says what it says without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hugging_face import make_llama, state_of

from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.layers.kernels import segment_positions
from lyrics_jax.inference.decode import greedy
from lyrics_jax.models.llm.llama import Llama

BATCH, LENGTH = 3, 7
VALID = np.arange(LENGTH) < np.array([[7], [5], [3]])
SEGMENTS = VALID.astype(np.int32)
IDS = np.random.default_rng(0).integers(0, 50, (BATCH, LENGTH)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), IDS.shape)


@dataclasses.dataclass
class Case:
  theirs: transformers.LlamaForCausalLM
  graph: nnx.GraphDef
  state: nnx.State

  @property
  def ours(self) -> Llama:
    return nnx.merge(self.graph, self.state)


@pytest.fixture(scope="module", params=[4, 2, 1], ids=lambda n: f"kv_heads{n}")
def case(request):
  theirs = make_llama(layers=3, kv_heads=request.param, spread=0.2)
  config = LlamaSettings(vocab_size=50, width=32, layers=3, heads=4, kv_heads=request.param, mlp_dim=48, lora=None)
  graph, state = nnx.split(Llama(config, rngs=nnx.Rngs(0)))
  return Case(theirs, graph, state_of(theirs, state))


@pytest.fixture(scope="module")
def logits(case):
  """Ours, without a cache."""
  @jax.jit
  def run(state):
    model = nnx.merge(case.graph, state)
    return model.logits(model(model.words(IDS), POSITIONS, SEGMENTS)[0])

  return np.asarray(run(case.state))


def test_equals_hugging_face(case, logits):
  with torch.no_grad():
    theirs = case.theirs(torch.tensor(IDS).long(), attention_mask=torch.tensor(VALID).long()).logits.numpy()
  np.testing.assert_allclose(logits[VALID], theirs[VALID], atol=1e-4, rtol=1e-4)  # float32 in both; logits of size 10


def test_packed_conversations_do_not_see_each_other(case):
  """Three in a row, with padding in front, between and behind: what Hugging Face says of each alone."""
  ids = np.concatenate([IDS[0], IDS[1]])[None]
  segments = np.array([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 3, 3, 0]], np.int32)

  @jax.jit
  def run(state):
    model = nnx.merge(case.graph, state)
    return model.logits(model(model.words(ids), segment_positions(segments), segments)[0])

  packed = np.asarray(run(case.state))
  for number in (1, 2, 3):
    own = segments[0] == number
    with torch.no_grad():
      alone = case.theirs(torch.tensor(ids[:, own]).long()).logits.numpy()
    np.testing.assert_allclose(packed[:, own], alone, atol=1e-4, rtol=1e-4)  # float32 in both; logits of size 10


def test_a_cache_changes_nothing(case, logits):
  """Four tokens at once, then one by one, into a cache with slots to spare; the padding of a row is at its end."""
  model, slots, first = case.ours, 9, 4
  segments = jnp.pad(SEGMENTS, ((0, 0), (0, slots - LENGTH)))
  step = jax.jit(lambda state, ids, positions, cache, slot: (lambda m: (lambda h, c: (m.logits(h), c))(
      *m(m.words(ids), positions, segments, cache=cache, slot=slot)))(nnx.merge(case.graph, state)))
  cache = model.empty_cache(BATCH, slots, jnp.float32)
  said = []
  for start, end in [(0, first), *((t, t + 1) for t in range(first, LENGTH))]:
    out, cache = step(case.state, IDS[:, start:end], POSITIONS[:, start:end], cache, start)
    said.append(np.asarray(out))
  # The same sums, padded.
  np.testing.assert_allclose(np.concatenate(said, axis=1)[VALID], logits[VALID], atol=1e-5, rtol=1e-5)


def test_greedy_decoding_equals_hugging_face(case):
  """A padded prompt continues as Hugging Face continues the prompt alone; after `eos` comes `eos`."""
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
  @jax.jit
  def decoded(state):
    model = nnx.merge(case.graph, state)
    return greedy(model, model.words(IDS), jnp.asarray(VALID), new, eos)

  assert np.asarray(decoded(case.state)).tolist() == ended
