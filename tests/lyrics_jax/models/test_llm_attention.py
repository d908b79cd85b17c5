"""The language model's attention: kernels agree, are chosen by platform and shape, and see only their own segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.sharding import MeshSettings
from lyrics_jax.models.layers import kernels
from lyrics_jax.models.layers.kernels import causal_attention, causal_mask, segment_positions, select
from lyrics_jax.models.llm.llama import Llama
from lyrics_jax.sharding import MESH_AXES, make_mesh
from refiner_export.common.settings import UserError

BATCH, LENGTH = 4, 130  # two blocks of 128 tokens, the second one mostly padding
# Two conversations and padding, one that fills the row, three, and one whose padding stands in front.
SEGMENTS = np.stack([np.repeat([1, 2, 0], [70, 50, 10]), np.ones(LENGTH), np.repeat([1, 2, 3], [1, 127, 2]),
                     np.repeat([0, 1], [20, 110])]).astype(np.int32)


def llm(heads=4, kv_heads=2, width=8):
  return LlamaSettings(heads=heads, kv_heads=kv_heads, width=heads * width)


def run(name, query, key, value, segments=SEGMENTS, dtype=None):
  """One kernel's output at real tokens, and the gradients of a weighted sum of it.

  `dtype`: what the kernel is told that it computes in.
  """
  weights = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32) * (segments > 0)[:, None, :, None]

  @jax.jit
  def outputs(*inputs):
    attend = causal_attention(segments, llm(query.shape[1], key.shape[1]), name, jnp.dtype(dtype or query.dtype))
    out, pullback = jax.vjp(attend, *inputs)
    return out, *pullback(weights)

  out, *gradients = map(np.asarray, outputs(query, key, value))
  return out.transpose(0, 2, 1, 3)[segments > 0], *gradients


def inputs(heads, kv_heads):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((BATCH, n, LENGTH, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads)]


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
  monkeypatch.setattr(kernels, "_LONGEST_BLOCK", 128)


@pytest.mark.parametrize("heads, kv_heads, mesh", [(2, 2, None), (4, 2, (1, 1, 1)), (4, 2, (2, 2, 2))])
def test_splash_equals_xla(heads, kv_heads, mesh):
  """Output and gradients, packed and padded, grouped queries too; with a mesh on each device its own rows and heads."""
  q, k, v = inputs(heads, kv_heads)
  expected = run("xla", q, k, v)
  if mesh is None:
    got = run("splash", q, k, v)
  else:
    with jax.set_mesh(make_mesh(MeshSettings(*mesh), jax.devices()[:int(np.prod(mesh))])):
      got = run("splash", q, k, v)
  for ours, theirs in zip(got, expected):
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)  # float32 sums in another order; values of size 1


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2)])
def test_cudnn_is_asked_for_the_same(heads, kv_heads, monkeypatch):
  """What the kernel is given, computed by another implementation of the same call: cuDNN itself needs a GPU."""
  asked, real = [], jax.nn.dot_product_attention

  def on_xla(*inputs, implementation, **more):
    asked.append(implementation)
    return real(*inputs, implementation="xla", **more)

  monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
  q, k, v = inputs(heads, kv_heads)
  got = run("cudnn", q, k, v, dtype="bfloat16")
  assert asked == ["cudnn"]
  for ours, theirs in zip(got, run("xla", q, k, v)):
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)  # float32 sums in another order; values of size 1


def test_cudnn_takes_these_shapes(monkeypatch):
  """JAX's own checks of what cuDNN can do pass, forward and backward, when a program for a GPU is lowered here."""
  cudnn = "jax._src.cudnn.fused_attention_stablehlo."
  monkeypatch.setattr(f"{cudnn}check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(f"{cudnn}check_compute_capability", lambda capability: capability in ("8.0", "9.0"))
  attend = causal_attention(jnp.asarray(SEGMENTS), llm(width=128), "cudnn", jnp.dtype("bfloat16"))
  gradient = jax.jit(jax.grad(lambda *inputs: attend(*inputs).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
  shapes = [jax.ShapeDtypeStruct((BATCH, n, LENGTH, 128), jnp.bfloat16) for n in (4, 2, 2)]
  text = gradient.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  assert "@__cudnn$fmhaScaleBiasSoftmax(" in text and "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text


def test_xla_equals_a_softmax_over_the_own_segment():
  q, k, v = inputs(2, 1)
  out = np.asarray(causal_attention(SEGMENTS, llm(2, 1), "xla", q.dtype)(q, k, v))
  for row, token in ((0, 0), (0, 69), (0, 70), (0, 119), (2, 128), (3, 60)):
    own = [t for t in range(token + 1) if SEGMENTS[row, t] == SEGMENTS[row, token]]
    for head in range(2):
      scores = np.asarray(k)[row, 0, own] @ np.asarray(q)[row, head, token] / np.sqrt(8)
      weights = np.exp(scores - scores.max())
      np.testing.assert_allclose(out[row, head, token], weights / weights.sum() @ np.asarray(v)[row, 0, own], atol=1e-5)


def test_only_xla_makes_a_dense_mask():
  shapes = [jax.ShapeDtypeStruct((BATCH, n, LENGTH, 8), jnp.float32) for n in (4, 2, 2)]
  square = {name: f"[{BATCH},1,{LENGTH},{LENGTH}]" in str(jax.make_jaxpr(
      lambda *inputs: causal_attention(jnp.asarray(SEGMENTS), llm(), name, jnp.float32)(*inputs))(*shapes))
            for name in ("xla", "splash")}
  assert square == {"xla": True, "splash": False}


@pytest.mark.parametrize("kernel", ["splash", "xla"])
def test_remat_may_keep_what_attention_gave(kernel):
  """With remat=attention its output and normaliser are computed once, with remat=full again in the backward pass."""
  config = LlamaSettings(vocab_size=5, width=16, layers=2, heads=2, kv_heads=2, mlp_dim=8, lora=None)
  segments = jnp.asarray(SEGMENTS)

  def program(remat):
    compute = Compute(remat=remat, attention=kernel)
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, compute, rngs=nnx.Rngs(0))))
    loss = lambda state, x: nnx.merge(graph, state)(x, segment_positions(segments), segments)[0].sum()
    x = jax.ShapeDtypeStruct((*segments.shape, config.width), jnp.float32)
    return str(jax.make_jaxpr(jax.grad(loss))(state, x))

  none, kept, full = map(program, ("none", "attention", "full"))
  results = lambda text: text.count("name=attention]")
  assert results(none) == results(kept) == 2 < results(full)
  if kernel == "xla":
    assert full.count("= dot_general[") == kept.count("= dot_general[") + 2  # scores, and their product with the values


def test_a_mask_of_a_part_of_the_cache():
  whole = np.asarray(causal_mask(jnp.asarray(SEGMENTS)))
  np.testing.assert_array_equal(causal_mask(jnp.asarray(SEGMENTS), 60, 7), whole[:, :, 60:67])


def test_positions_restart_with_each_segment():
  segments = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1], [1, 2, 2, 3, 3, 3]])
  assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3], [0, 0, 1, 0, 1, 2]]


def on(platform, sizes=(2, 2, 1)):
  """A mesh of devices that this machine lacks, as when compiling ahead of time."""
  device = AbstractDevice(device_kind="made-up", num_cores=None, platform=platform)
  return jax.sharding.use_abstract_mesh(
      AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device))


@pytest.mark.parametrize("platform, sizes, config, dtype, chosen", [
    ("tpu", (2, 2, 1), llm(width=128), "bfloat16", "splash"),
    ("tpu", (2, 1, 2), llm(width=64), "float32", "splash"),
    ("tpu", (2, 2, 1), llm(width=40), "bfloat16", "xla"),  # heads of another width
    ("tpu", (1, 1, 4), llm(width=128), "bfloat16", "xla"),  # two key heads for four devices
    ("tpu", (8, 1, 1), llm(width=128), "bfloat16", "xla"),  # four rows for eight devices
    ("cuda", (2, 2, 1), llm(width=128), "bfloat16", "cudnn"),
    ("cuda", (2, 2, 1), llm(width=128), "float32", "xla"),
    ("cuda", (2, 2, 1), llm(width=160), "bfloat16", "xla"),
    ("cpu", (2, 2, 1), llm(width=128), "bfloat16", "xla"),
])
def test_auto_goes_by_platform_and_shape(platform, sizes, config, dtype, chosen):
  with on(platform, sizes):
    assert select("auto", (BATCH, LENGTH), config, jnp.dtype(dtype)) == chosen


def test_without_a_mesh_this_process_decides():
  assert select("auto", (BATCH, LENGTH), llm(width=128), jnp.dtype("bfloat16")) == "xla"
  assert select("splash", (BATCH, LENGTH), llm(), jnp.dtype("float32")) == "splash"


@pytest.mark.parametrize("asked, shape, sizes, config, dtype, message", [
    ("splash", (4, 130), (1, 1, 4), llm(), "float32",
     r"^config.compute.attention=splash: config.mesh.tensor=4 does not divide the language model's kv_heads=2; use "),
    ("splash", (4, 130), (8, 1, 1), llm(), "float32",
     r"^config.compute.attention=splash: 4 rows do not divide over config.mesh.data x config.mesh.fsdp = 8 devices; "),
    ("cudnn", (4, 130), (1, 1, 1), llm(), "float32", r"attention=cudnn: it needs config.compute.dtype=bfloat16; "),
    ("cudnn", (4, 131), (1, 1, 1), llm(), "bfloat16", r"attention=cudnn: a conversation of 131 tokens is odd, "),
    ("cudnn", (4, 130), (1, 1, 1), llm(width=132), "bfloat16",
     r"^config.compute.attention=cudnn: heads of the language model are 132 wide, it takes multiples of 8 up to 128; "),
])
def test_a_kernel_that_cannot_run(asked, shape, sizes, config, dtype, message):
  with on("tpu", sizes), pytest.raises(UserError, match=message):
    select(asked, shape, config, jnp.dtype(dtype))
