"""Greedy decoding with a key-value cache, for a batch of prompts of different lengths."""

import jax
import jax.numpy as jnp

from lyrics_jax.models.llm.llama import Llama

Array = jax.Array


def greedy(llm: Llama, embeddings: Array, valid: Array, max_new_tokens: int, eos: int) -> Array:
  """The most probable next token, again and again, until each row has ended.

  Prompts are padded at their end. All rows write a new token into the same cache slot. The token's rotary position
  follows the length of its row, and the slots of padding are masked.

  Args:
    embeddings: [B, T, D], the embedded prompts.
    valid: bool[B, T], False on padding.
    eos: the token that ends an answer; -1 lets no answer end.

  Returns:
    int32[B, max_new_tokens]; from the end of an answer on, `eos`.
  """
  batch, length, _ = embeddings.shape
  lengths = valid.sum(1, dtype=jnp.int32)
  last, cache, segments = _prefill(llm, embeddings, valid, lengths, length + max_new_tokens)

  def unfinished(carry):
    step, token, _, _, _, done = carry
    return (step < max_new_tokens) & ~(done | (token == eos)).all()

  def extend(carry):
    step, token, cache, segments, answer, done = carry
    answer = answer.at[:, step].set(jnp.where(done, eos, token))
    done = done | (token == eos)
    slot = length + step
    segments = segments.at[:, slot].set(1)
    embedded = llm.words(token)[:, None].astype(embeddings.dtype)
    hidden, cache = llm(embedded, (lengths + step)[:, None], segments, cache=cache, slot=slot)
    return step + 1, _most_probable(llm, hidden[:, 0]), cache, segments, answer, done

  answer = jnp.full((batch, max_new_tokens), eos, jnp.int32)
  start = (jnp.int32(0), _most_probable(llm, last), cache, segments, answer, jnp.zeros(batch, bool))
  return jax.lax.while_loop(unfinished, extend, start)[4]


def _prefill(llm: Llama, embeddings: Array, valid: Array, lengths: Array, slots: int):
  """Reads the prompts: the last valid hidden state [B, D], the cache, and the segments int32[B, slots] of its slots."""
  batch, length, _ = embeddings.shape
  positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
  segments = jnp.pad(valid.astype(jnp.int32), ((0, 0), (0, slots - length)))
  cache = llm.empty_cache(batch, slots, embeddings.dtype)
  hidden, cache = llm(embeddings, positions, segments, cache=cache)
  last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
  return last, cache, segments


def _most_probable(llm: Llama, hidden: Array) -> Array:
  """[B, D] -> int32[B]."""
  return llm.logits(hidden).argmax(-1).astype(jnp.int32)
