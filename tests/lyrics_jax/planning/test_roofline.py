"""The compiler's cycles, from which the planner predicts, against what a chip can do at best (docs/plan.md)."""

import jax
import jax.numpy as jnp
import pytest

from lyrics_jax.models.layers.kernels import causal_attention
from lyrics_jax.models.layers.linear import product_from_heads, product_to_heads
from lyrics_jax.models.llm.llama import LlamaSettings, rotary
from lyrics_jax.planning.cost import KERNEL_EFFICIENCY, kernel_flops
from lyrics_jax.planning.hbm import bytes_moved
from lyrics_jax.planning.hlo import Module
from lyrics_jax.planning.topology import Target
from lyrics_jax.sharding import MeshSettings, everywhere, make_mesh
from lyrics_jax.training.compiler import compiler_options

pytestmark = pytest.mark.slow


@pytest.fixture
def target(request):
  pytest.importorskip("libtpu")
  return Target.of(request.param)


def compiled(target, function, *shapes):
  """The module of a function on one chip, compiled with the options of a train step."""
  mesh = make_mesh(MeshSettings(1, 1, 1), target.devices[:1])
  arguments = []
  for shape, dtype in shapes:
    arguments.append(jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere(mesh)))
  step = jax.jit(function, compiler_options=compiler_options(mesh))
  with jax.set_mesh(mesh):
    return Module.parse(step.lower(*arguments).compile().as_text())


@pytest.mark.parametrize("target", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"], indirect=True)
def test_a_chain_of_matrix_products(target):
  size = 4096
  square = (size, size), jnp.bfloat16
  module = compiled(target, lambda x, w: x @ w @ w @ w @ w, square, square)
  assert module.cycles / target.chip.clock == pytest.approx(4 * 2 * size**3 / target.chip.flops, rel=0.25)


@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1"], indirect=True)
def test_an_attention_layer(target):
  """The layer of Vicuna-13B on 16 rows of 512 tokens: everything from q, k and v to o, with the splash kernel."""
  config, rows, length = LlamaSettings.vicuna_13b(), 16, 512
  width = config.width

  def layer(x, segments, positions, q, k, v, o):
    query, key, value = (product_to_heads(x, weight, config.heads) for weight in (q, k, v))
    turned = (rotary(heads, positions, config.rope_theta) for heads in (query, key))
    return x + product_from_heads(causal_attention(segments, config, "splash", x.dtype)(*turned, value), o)

  tokens, matrix = ((rows, length), jnp.int32), ((width, width), jnp.bfloat16)
  module = compiled(target, layer, ((rows, length, width), jnp.bfloat16), tokens, tokens, *[matrix] * 4)
  chip, attention = target.chip, sum(kernel_flops(call) * times for call, times in module.kernels())
  bound = max((4 * 2 * rows * length * width**2 + attention) / chip.flops, bytes_moved(module) / chip.hbm_bandwidth)
  predicted = module.cycles / chip.clock + attention / (chip.flops * KERNEL_EFFICIENCY)
  assert predicted == pytest.approx(bound, rel=0.25)
