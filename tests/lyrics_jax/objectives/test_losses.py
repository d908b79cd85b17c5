"""The pieces of every loss."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lyrics_jax.objectives.base import cross_entropy, masked_mean


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_equals_torch(smoothing):
  rng = np.random.default_rng(0)
  logits, targets = rng.standard_normal((3, 5, 11)).astype(np.float32) * 4, rng.integers(0, 11, (3, 5))
  flat = torch.tensor(logits).reshape(-1, 11), torch.tensor(targets).reshape(-1)
  expected = torch.nn.functional.cross_entropy(*flat, reduction="none", label_smoothing=smoothing)
  ours = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), smoothing)
  np.testing.assert_allclose(ours, expected.reshape(3, 5).numpy(), rtol=1e-6, atol=1e-6)  # float32 in both


def test_cross_entropy_is_float32_whatever_the_logits():
  logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1000)), jnp.bfloat16)
  loss = cross_entropy(logits, jnp.zeros(4, jnp.int32))
  assert loss.dtype == jnp.float32
  np.testing.assert_array_equal(loss, cross_entropy(logits.astype(jnp.float32), jnp.zeros(4, jnp.int32)))


def test_masked_mean():
  values, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
  assert masked_mean(values, mask) == 2
  assert masked_mean(values, jnp.zeros(3, bool)) == 0
