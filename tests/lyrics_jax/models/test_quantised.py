"""Kernels in int8: each weight and each output is off by the rounding and no more."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lyrics_jax.config import LoRAConfig
from lyrics_jax.models.layers import Linear
from lyrics_jax.models.lora import LoRALinear
from lyrics_jax.models.quantised import dequantise, quantise


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


@pytest.mark.parametrize("make", [Linear, lambda *args, **kwargs: LoRALinear(*args[:3], LoRAConfig(rank=2), **kwargs)],
                         ids=["linear", "lora"])
def test_a_layer_is_within_the_bound_of_its_rounding(make):
  rngs = lambda: nnx.Rngs(0)
  plain, int8 = (make(64, 24, ("embed", "mlp"), rngs=rngs(), int8=flag) for flag in (False, True))
  x = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32)
  error = np.abs(np.asarray(int8(x) - plain(x)))
  bound = np.abs(x).sum(-1, keepdims=True) * np.asarray(int8.kernel_scale[...]) / 2
  assert (error <= bound + 1e-5).all() and error.max() > 1e-4  # float32 sums; quantised it is
  np.testing.assert_array_equal(plain.kernel[...], make(64, 24, ("embed", "mlp"), rngs=rngs()).kernel[...])
