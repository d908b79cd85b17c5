"""Attention that may look nowhere, the scanned stack, rematerialisation, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lyrics_jax.models.layers.attention import attend
from lyrics_jax.models.layers.dropout import dropout
from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.layers.stack import Stack


def test_attention_that_may_look_nowhere_is_zero():
  rng = np.random.default_rng(0)
  shapes = (2, 3, 4, 5), (2, 6, 2, 5), (2, 6, 2, 5)
  q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
  mask = rng.random((2, 1, 3, 6)) < 0.6
  mask[0, 0, 1], mask[1] = False, False
  out = np.asarray(attend(q, k, v, jnp.asarray(mask)))
  assert not out[0, 1].any() and not out[1].any() and out[0, 0].any()
  for row in (0, 2):  # the others: softmax over what they may see, two query heads to one of the keys
    for head in range(4):
      seen = mask[0, 0, row]
      scores = np.asarray(k)[0, seen, head // 2] @ np.asarray(q)[0, row, head] / np.sqrt(5)
      weights = np.exp(scores) / np.exp(scores).sum()
      np.testing.assert_allclose(out[0, row, head], weights @ np.asarray(v)[0, seen, head // 2], atol=1e-6)
  gradient = jax.grad(lambda q: attend(q, k, v, jnp.asarray(mask)).sum())(q)
  assert np.isfinite(gradient).all() and not np.asarray(gradient)[1].any()


def test_attention_to_an_empty_source_is_zero():
  q, nothing = jnp.ones((2, 3, 4, 5)), jnp.zeros((2, 0, 4, 5))
  out = attend(q, nothing, nothing, jnp.zeros((2, 1, 3, 0), bool))
  assert out.shape == q.shape and not np.asarray(out).any()


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = Linear(8, 8, ("embed", "mlp"), rngs=rngs)

  def __call__(self, x, shift, key):
    y = jnp.tanh(self.linear(x) + shift)
    return dropout(y, 0.3, key), y


STACK = Stack(lambda rngs: Block(rngs), 4, rngs=nnx.Rngs(0))
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
SHIFTS = jnp.arange(4.0)


def scan(stack, remat="none", key=None):
  return stack.scan(lambda block, x, shift, key: block(x, shift, key), X, SHIFTS, key=key, remat=remat)


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["still", "dropout"])
def test_scan_equals_a_loop(key):
  graph, state = nnx.split(STACK.blocks)
  keys = [None] * 4 if key is None else jax.random.split(key, 4)
  x, seen = X, []
  for depth in range(4):
    block = nnx.merge(graph, jax.tree.map(lambda a: a[depth], state))
    x, y = block(x, SHIFTS[depth], keys[depth])
    seen.append(y)
  last, ys = scan(STACK, key=key)
  np.testing.assert_allclose(last, x, atol=1e-6)
  np.testing.assert_allclose(ys, jnp.stack(seen), atol=1e-6)


def test_blocks_begin_differently():
  kernels = np.asarray(STACK.blocks.linear.kernel[...])
  assert kernels.shape == (4, 8, 8)
  assert min(np.abs(kernels[a] - kernels[b]).max() for a in range(4) for b in range(a)) > 0.1


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_rematerialisation_changes_nothing(remat):
  graph, state = nnx.split(STACK)
  loss = lambda state, remat: jnp.square(scan(nnx.merge(graph, state), remat, jax.random.key(1))[0]).sum()
  value, gradient = jax.value_and_grad(loss)(state, "none")
  same_value, same_gradient = jax.value_and_grad(loss)(state, remat)
  np.testing.assert_allclose(same_value, value, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), same_gradient, gradient)


@pytest.mark.parametrize("width", [200, 201])
def test_dropout_keeps_the_mean(width):
  x = jnp.ones((200, width))
  out = np.asarray(dropout(x, 0.25, jax.random.key(0)))
  assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
  assert out.mean() == pytest.approx(1, abs=0.015)  # five standard deviations of 40,000 draws
  # The halves of a row, whose numbers share their random words, are dropped each with this rate and independently.
  first, second = out[:, :100] > 0, out[:, -100:] > 0
  for kept, share in ((first, 0.75), (second, 0.75), (first & second, 0.75**2)):
    assert kept.mean() == pytest.approx(share, abs=0.018)  # five standard deviations of 20,000 draws
  assert dropout(x, 0.25, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
