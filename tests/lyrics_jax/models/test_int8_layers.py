"""Kernels in int8: each weight and each output is off by the rounding and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.layers.lora import LoRALinear
from lyrics_jax.models.layers.int8 import dequantise, quantise


def make_lora(n, m, axes, **more):
  return LoRALinear(n, m, axes, LoRASettings(rank=2), **more)


def test_a_weight_is_off_by_half_a_step():
  kernel = np.random.default_rng(0).standard_normal((3, 40, 5)).astype(np.float32)
  kernel *= np.array([1e-4, 1, 0, 30, 1e3], np.float32)
  values, scale = quantise(jnp.asarray(kernel))
  assert values.dtype == jnp.int8 and scale.shape == (3, 5) and scale.dtype == jnp.float32
  np.testing.assert_allclose(scale[:, 1], np.abs(kernel[:, :, 1]).max(1) / 127, rtol=1e-6)
  assert np.abs(values).max(1).tolist() == [[127, 127, 0, 127, 127]] * 3  # all of the range is used
  error = np.abs(np.asarray(dequantise(values, scale)) - kernel)
  assert (error <= np.asarray(scale)[:, None] * 0.5001).all()  # and rounding of float32
  assert not error[:, :, 2].any()
  outputs_first = quantise(jnp.asarray(kernel.swapaxes(1, 2)), -1)
  np.testing.assert_array_equal(outputs_first[0], values.swapaxes(1, 2))
  np.testing.assert_array_equal(outputs_first[1], scale)


@pytest.mark.parametrize("make", [Linear, make_lora], ids=["linear", "lora"])
def test_a_layer_is_within_the_bound_of_its_rounding(make):
  rngs = lambda: nnx.Rngs(0)
  plain, int8 = (make(64, 24, ("embed", "mlp"), rngs=rngs(), int8=flag) for flag in (False, True))
  x = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32)
  error = np.abs(np.asarray(int8(x) - plain(x)))
  bound = np.abs(x).sum(-1, keepdims=True) * np.asarray(int8.kernel_scale[...]) / 2
  assert (error <= bound + 1e-5).all() and error.max() > 1e-4  # float32 sums; quantised it is
  np.testing.assert_array_equal(plain.kernel[...], make(64, 24, ("embed", "mlp"), rngs=rngs()).kernel[...])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("make", [Linear, make_lora], ids=["linear", "lora"])
def test_heads_are_rows_of_the_same_map(make, int8):
  """`to_heads` and `from_heads` against the plain map of the same draws, with a LoRA that does something."""
  def made(**heads):
    layer = make(24, 40, ("embed", "heads"), rngs=nnx.Rngs(0), int8=int8, **heads)
    if isinstance(layer, LoRALinear):
      layer.lora_b[...] = jax.random.normal(jax.random.key(1), (2, 40))
    return layer

  x = np.random.default_rng(1).standard_normal((3, 7, 24)).astype(np.float32)
  split = lambda y, heads: y.reshape(3, 7, heads, -1).swapaxes(1, 2)
  expected = np.asarray(made()(x))
  np.testing.assert_allclose(made(to_heads=5)(x), split(expected, 5), atol=1e-5)
  np.testing.assert_allclose(made(from_heads=4)(split(x, 4)), expected, atol=1e-5)
