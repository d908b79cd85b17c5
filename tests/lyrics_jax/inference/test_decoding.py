"""Greedy decoding with a cache against recomputing the whole sequence for every word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lyrics_jax.inference.decode import greedy
from lyrics_jax.models.llm.llama import Llama, LlamaSettings

NEW, LENGTH = 10, 14


@pytest.fixture(scope="module")
def prompts():
  """(language model, embeddings [B, T, D], valid bool[B, T]) of different lengths; padding is noise."""
  settings = LlamaSettings(vocab_size=48, width=16, layers=2, heads=4, kv_heads=2, mlp_dim=32, lora=None)
  rng = np.random.default_rng(0)
  graph, state = nnx.split(Llama(settings, rngs=nnx.Rngs(0)))
  # Fresh weights are so small that a model would say one word only.
  model = nnx.merge(graph, jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(a.dtype), state))
  embeddings = jnp.asarray(rng.standard_normal((5, LENGTH, settings.width)), jnp.float32)
  return model, embeddings, jnp.arange(LENGTH) < jnp.array([LENGTH, 5, 9, 1, 12])[:, None]


@pytest.fixture(scope="module")
def reference(prompts):
  """int (B, NEW), row by row without a cache, and without looking for an end."""
  llm, embeddings, valid = prompts
  slots = embeddings.shape[1] + NEW

  @jax.jit
  def next_word(sequence, length):
    segments = (jnp.arange(slots) < length)[None].astype(jnp.int32)
    hidden, _ = llm(sequence[None], jnp.arange(slots)[None], segments)
    return llm.logits(hidden[0, length - 1]).argmax()

  answers = []
  for row, length in zip(np.asarray(embeddings), np.asarray(valid.sum(1))):
    sequence = np.zeros((slots, row.shape[1]), np.float32)
    sequence[:length] = row[:length]
    answers.append([])
    for position in range(length, length + NEW):
      answers[-1].append(int(next_word(sequence, position)))
      sequence[position] = llm.words(jnp.array(answers[-1][-1]))
  return np.array(answers)


def test_the_cache_changes_nothing(prompts, reference):
  llm, embeddings, valid = prompts
  assert len(np.unique(reference)) > 5  # a model that says one word only would prove nothing
  np.testing.assert_array_equal(greedy(llm, embeddings, valid, NEW, eos=-1), reference)


def test_rows_end_one_by_one(prompts, reference):
  llm, embeddings, valid = prompts
  eos = int(reference[0, 3])
  ended = np.cumsum(reference == eos, axis=1) > 0
  assert ended[0].any() and not ended.all()
  np.testing.assert_array_equal(greedy(llm, embeddings, valid, NEW, eos), np.where(ended, eos, reference))


def test_a_row_does_not_see_the_others(prompts, reference):
  llm, embeddings, valid = prompts
  for row in (0, 3):
    alone = greedy(llm, embeddings[row:row + 1], valid[row:row + 1], NEW, eos=-1)
    np.testing.assert_array_equal(alone, reference[row:row + 1])
