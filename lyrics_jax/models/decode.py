"""Greedy decoding with a key-value cache, for a batch of prompts of different lengths."""

import jax
import jax.numpy as jnp

from lyrics_jax.models.layers import Array
from lyrics_jax.models.llama import LLaMA


def greedy(llm: LLaMA, embeddings: Array, valid: Array, max_new_tokens: int, eos: int) -> Array:
  """The most probable continuation of each prompt, word by word, until every row has ended.

  The prompts are padded at their end; a new token's cache slot is the same in all rows, its rotary position follows its
  own row's length, and padded slots are masked.

  Args:
    embeddings: [B, T, D], the prompts' embeddings; valid: bool[B, T], False on padding.

  Returns:
    int32[B, max_new_tokens]; `eos` from the end of the answer on.
  """
  batch, length, _ = embeddings.shape
  slots = length + max_new_tokens
  lengths = valid.sum(1, dtype=jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
  segments = jnp.pad(valid.astype(jnp.int32), ((0, 0), (0, max_new_tokens)))
  hidden, cache = llm(embeddings, positions, segments, cache=llm.empty_cache(batch, slots, embeddings.dtype))
  last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
  first = llm.logits(last).argmax(-1).astype(jnp.int32)

  def unfinished(carry):
    step, token, _, _, _, done = carry
    return (step < max_new_tokens) & ~(done | (token == eos)).all()

  def extend(carry):
    step, token, cache, segments, answer, done = carry
    answer = answer.at[:, step].set(jnp.where(done, eos, token))
    done = done | (token == eos)
    segments = segments.at[:, length + step].set(1)
    hidden, cache = llm(llm.words(token)[:, None].astype(embeddings.dtype), (lengths + step)[:, None],
                        segments, cache=cache, slot=length + step)
    return step + 1, llm.logits(hidden[:, 0]).argmax(-1).astype(jnp.int32), cache, segments, answer, done

  answer = jnp.full((batch, max_new_tokens), eos, jnp.int32)
  carry = (jnp.int32(0), first, cache, segments, answer, jnp.zeros(batch, bool))
  return jax.lax.while_loop(unfinished, extend, carry)[4]
