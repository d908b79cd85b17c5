"""The next-token loss in chunks is the plain one, its gradient too, and no array of it holds all logits."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lyrics_jax.objectives.base import cross_entropy, masked_mean
from lyrics_jax.objectives.next_token import next_token_loss
from lyrics_jax.sharding import BATCH, MeshSettings, make_mesh

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 11, 6, 48
rng = np.random.default_rng(0)
HIDDEN = rng.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
KERNEL = rng.standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
IDS = rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
IDS[:, 1::3] = (HIDDEN @ KERNEL).argmax(-1)[:, 0:-1:3]  # so that a model is right now and then
TRAINED = rng.random((ROWS, LENGTH)) < 0.6


def plain(hidden, kernel):
  logits, targets, used = (hidden @ kernel)[:, :-1], IDS[:, 1:], TRAINED[:, 1:]
  return masked_mean(cross_entropy(logits, targets), used), masked_mean(logits.argmax(-1) == targets, used)


def chunked(chunk):
  return lambda hidden, kernel, ids=IDS, trained=TRAINED: next_token_loss(
      lambda h: h @ kernel, hidden, ids, trained, chunk)


@pytest.fixture(scope="module")
def expected():
  (value, accuracy), gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(HIDDEN, KERNEL)
  assert 0.2 < accuracy < 0.6
  return value, accuracy, gradients


def assert_equal(got, expected):
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
  np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)
  for ours, theirs in zip(got[2], expected[2]):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 100])
def test_chunks_change_nothing(expected, chunk):
  loss = jax.value_and_grad(chunked(chunk), argnums=(0, 1), has_aux=True)
  (value, accuracy), gradients = jax.jit(loss)(HIDDEN, KERNEL)
  assert_equal((value, accuracy, gradients), expected)


def test_nothing_to_say_is_zero():
  assert next_token_loss(lambda h: h @ KERNEL, HIDDEN, IDS, np.zeros_like(TRAINED), 4) == (0, 0)


def test_a_split_vocabulary_stays_split(expected):
  """On eight devices, rows over four, vocabulary over two: each has a part of one chunk's logits; none travels."""
  mesh, chunk = make_mesh(MeshSettings(2, 2, 2)), 4
  split = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  batch = NamedSharding(mesh, BATCH)
  step = jax.jit(jax.value_and_grad(chunked(chunk), argnums=(0, 1), has_aux=True),
                 in_shardings=(batch, split("fsdp", "tensor"), batch, batch), out_shardings=None)
  with jax.set_mesh(mesh):
    inputs = [jax.device_put(x, s) for x, s in zip((HIDDEN, KERNEL, IDS, TRAINED),
                                                   (batch, split("fsdp", "tensor"), batch, batch))]
    program = step.lower(*inputs).compile()
    (value, accuracy), gradients = program(*inputs)
  assert_equal((value, accuracy, gradients), expected)
  shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text())]
  with_vocabulary = {shape for shape in shapes if len(shape) > 2 and shape[-1] in (VOCABULARY, VOCABULARY // 2)}
  assert with_vocabulary == {(ROWS // 4, chunk, VOCABULARY // 2)}
