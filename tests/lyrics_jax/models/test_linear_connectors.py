"""LLaVA's connectors against PyTorch's layers: a linear map and an MLP over each image token."""

import dataclasses

import numpy as np
import pytest
import torch
from flax import nnx

from lyrics_jax.models.connectors.mlp import LinearSettings, MLPSettings
from lyrics_jax.models.inputs import Features
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.vision.vit import ViTSettings

VISION = dataclasses.replace(ViTSettings(), image_size=28, width=6)
IMAGE = np.random.default_rng(0).standard_normal((3, VISION.tokens, VISION.width)).astype(np.float32)


def torch_linear(ours) -> torch.nn.Linear:
  kernel, bias = np.asarray(ours.kernel[...]), np.asarray(ours.bias[...])
  linear = torch.nn.Linear(*kernel.shape)
  linear.load_state_dict({"weight": torch.tensor(kernel.T), "bias": torch.tensor(bias)})
  return linear


@pytest.mark.parametrize("settings, names", [(LinearSettings(), ["linear"]), (MLPSettings(), ["linear_1", "linear_2"])])
def test_the_outputs_of_pytorch(settings, names):
  connector = settings.build(VISION, 8, Compute(dtype="float32"), nnx.Rngs(0))
  layers = []
  for name in names:
    layers += [torch.nn.GELU(), torch_linear(getattr(connector, name))]
  with torch.no_grad():
    expected = torch.nn.Sequential(*layers[1:])(torch.tensor(IMAGE)).numpy()
  got = connector(Features(IMAGE), connector.text({}))
  assert got.shape == (3, settings.tokens(VISION), 8)
  np.testing.assert_allclose(got, expected, atol=1e-5)  # float32 sums of 6 and 8 products
