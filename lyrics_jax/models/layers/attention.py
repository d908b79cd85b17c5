"""Scaled dot-product attention that stores no scores."""

import functools
import math

import jax
import jax.numpy as jnp

from lyrics_jax.models.layers.parameter import Array
from lyrics_jax.models.layers.remat import ATTENTION, named

_UNSEEN = jnp.finfo(jnp.float32).min  # stands for the score of a key that a query may not see
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
  """`attend_by_head` with tokens first: [B, Tq, H, d], [B, Tk, K, d] twice -> [B, Tq, H, d]."""
  heads_first = [x.transpose(0, 2, 1, 3) for x in (query, key, value)]
  return attend_by_head(*heads_first, mask).transpose(0, 2, 1, 3)


def attend_by_head(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
  """Scaled dot-product attention; softmax in float32.

  No scores are stored: the backward pass computes them again from each query's normaliser, by the formulas of flash
  attention (Dao et al. 2022, section 3.1). Stored scores are the largest arrays of a training step, and writing them
  costs more than the one product that replaces them.

  Args:
    query: [B, H, Tq, d]. key, value: [B, K, Tk, d], where K divides H (grouped queries).
    mask: bool[B, 1, Tq or 1, Tk], True where the query may look, or None for everywhere.

  Returns:
    [B, H, Tq, d]; zero for a query that may look nowhere, so that an absent source adds nothing.
  """
  groups = query.shape[1] // key.shape[1]
  if mask is not None and mask.shape[2] > 1:
    mask = jnp.tile(mask, (1, 1, groups, 1))
  # The queries that share a key stand in one row of its head.
  rows = query.reshape(len(query), key.shape[1], -1, query.shape[3])
  return _attend(rows, key, value, mask).reshape(query.shape)


@jax.custom_vjp
def _attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
  """query: [B, H, Tq, d]; key, value: [B, H, Tk, d]; mask broadcasts to [B, H, Tq, Tk]. Returns [B, H, Tq, d]."""
  return _forward(query, key, value, mask)[0]


def _scores(query: Array, key: Array, mask: Array | None) -> Array:
  scores = _product("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1])
  return scores if mask is None else jnp.where(mask, scores, _UNSEEN)


def _forward(query: Array, key: Array, value: Array, mask: Array | None):
  scores = _scores(query, key, mask)
  largest = scores.max(-1, keepdims=True, initial=_UNSEEN)
  weights = jnp.exp(scores - largest)
  total = weights.sum(-1, keepdims=True)
  out = _product("bhqk,bhkd->bhqd", weights.astype(value.dtype), value) / total
  blind = largest == _UNSEEN
  out = named(jnp.where(blind, 0, out).astype(query.dtype), ATTENTION)
  # A query that sees nothing gets an infinite normaliser, which makes all its weights zero in the backward pass.
  normaliser = named(jnp.where(blind, jnp.inf, largest + jnp.log(total)), ATTENTION)
  return out, (query, key, value, mask, normaliser, out)


def _backward(stored, gradient: Array):
  query, key, value, mask, normaliser, out = stored
  weights = jnp.exp(_scores(query, key, mask) - normaliser)
  by_weight = _product("bhqd,bhkd->bhqk", gradient, value)
  along_out = (gradient.astype(jnp.float32) * out).sum(-1, keepdims=True)
  by_score = (weights * (by_weight - along_out) / math.sqrt(query.shape[-1])).astype(query.dtype)
  by_query = _product("bhqk,bhkd->bhqd", by_score, key)
  by_key = _product("bhqk,bhqd->bhkd", by_score, query)
  by_value = _product("bhqk,bhqd->bhkd", weights.astype(value.dtype), gradient)
  return by_query.astype(query.dtype), by_key.astype(key.dtype), by_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)
