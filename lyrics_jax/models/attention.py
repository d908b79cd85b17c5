"""The language model's causal self-attention over packed rows, and the choice of the kernel that computes it.

A row is one conversation or several behind each other; `segments` numbers them and is 0 on padding. A token sees the
tokens of its own segment up to itself (padding sees padding, so that no query is blind and every kernel agrees).

  xla     `layers.attend_by_head` with a dense mask, on any device; always used with a cache.
  splash  JAX's Pallas kernel for TPUs, which needs no mask in memory and skips what causality hides. Under a mesh each
          device computes its own rows and heads. On other platforms it is interpreted, for tests.
  cudnn   the flash attention of NVIDIA's library, in 16 bits.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import AbstractMesh, PartitionSpec

from lyrics_jax.config import Attention, LLMConfig
from lyrics_jax.models.layers import ATTENTION, ROWS, Array, attend_by_head
from refiner_export.common.settings import require

_HEADS = "tensor"  # the mesh axis over which `training/sharding.py` splits heads
_LANES = 128  # of a TPU's vector unit: a block of tokens is a multiple of it
_LONGEST_BLOCK = 512  # tokens; longer blocks skip less of the causal triangle and need more of the fast memory


def causal_attention(segments: Array, config: LLMConfig, attention: Attention, dtype: jnp.dtype) -> Callable:
  """A function of query [B, H, T, d], key and value [B, K, T, d] to [B, H, T, d], for rows of these segments, int32[B, T].

  Only a kernel that needs the dense mask has it made, once for all layers. Raises `UserError`, see `select`.
  """
  chosen = select(attention, segments.shape, config, dtype)
  if chosen == "splash":
    return functools.partial(_splash, segments=segments)
  mask = causal_mask(segments)
  if chosen == "cudnn":
    return functools.partial(_cudnn, mask=mask)
  return functools.partial(attend_by_head, mask=mask)


def causal_mask(segments: Array, slot: int | Array = 0, rows: int | None = None) -> Array:
  """bool[B, 1, T, S] from int32[B, S]: what each of the `rows` = T tokens (all by default) from `slot` on may see."""
  batch, slots = segments.shape
  rows = slots if rows is None else rows
  own = jax.lax.dynamic_slice(segments, (0, slot), (batch, rows))
  before = jnp.arange(slots) <= slot + jnp.arange(rows)[:, None]
  return (before & (own[:, :, None] == segments[:, None, :]))[:, None]


def segment_positions(segments: Array) -> Array:
  """int32[B, T]: each token's place in its own segment, from 0 on."""
  place = jnp.arange(segments.shape[1], dtype=jnp.int32)
  begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
  return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)


def select(attention: Attention, shape: tuple[int, int], config: LLMConfig, dtype: jnp.dtype) -> str:
  """Which kernel computes for `shape` = (B, T): "xla", "splash" or "cudnn".

  "auto" is splash on a TPU, cudnn in bfloat16 on a GPU, and xla elsewhere or for shapes that these do not take. The
  platform is the current mesh's (`jax.set_mesh`), not always this process's: programs are compiled ahead of time.

  Raises:
    UserError: the kernel asked for does not take these shapes or this dtype.
  """
  mesh = jax.sharding.get_abstract_mesh()
  platform = _platform(mesh)
  batch, length = shape
  hindrance = {"splash": _splash_hindrance(mesh, batch, config), "cudnn": _cudnn_hindrance(length, config, dtype),
               "xla": ""}
  if attention == "auto":
    # Narrower heads would waste most of the lanes.
    wide = config.width // config.heads % (_LANES // 2) == 0
    best = {"tpu": "splash" if wide else "xla", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
    return "xla" if hindrance[best] else best
  require(not hindrance[attention], f"config.model.attention={attention}: {hindrance[attention]}; use auto or xla")
  return attention


def _platform(mesh: AbstractMesh) -> str:
  return jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.platform


def _splash_hindrance(mesh: AbstractMesh, batch: int, config: LLMConfig) -> str:
  """Why splash cannot run on this mesh; empty where it can."""
  shards = math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
  if batch % shards:
    return f"{batch} rows do not divide over config.mesh.data x config.mesh.fsdp = {shards} devices"
  tensor = mesh.shape.get(_HEADS, 1)
  if config.kv_heads % tensor:
    return f"config.mesh.tensor={tensor} does not divide config.model.llm.kv_heads={config.kv_heads}"
  return ""


def _cudnn_hindrance(length: int, config: LLMConfig, dtype: jnp.dtype) -> str:
  width = config.width // config.heads
  if dtype != jnp.bfloat16:
    return "it needs config.model.dtype=bfloat16"
  if width > 128 or width % 8:
    return f"heads of config.model.llm are {width} wide, it takes multiples of 8 up to 128"
  return f"a conversation of {length} tokens is odd, its gradient takes even ones" if length % 2 else ""


def _cudnn(query: Array, key: Array, value: Array, mask: Array) -> Array:
  tokens_first = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
  return jax.nn.dot_product_attention(*tokens_first, mask=mask, implementation="cudnn").transpose(0, 2, 1, 3)


def _splash(query: Array, key: Array, value: Array, segments: Array) -> Array:
  mesh = jax.sharding.get_abstract_mesh()
  local = functools.partial(_splash_on_device, interpret=_platform(mesh) != "tpu")
  if mesh.empty:
    return local(query, key, value, segments)
  heads = PartitionSpec(ROWS, _HEADS)
  return jax.shard_map(local, in_specs=(heads, heads, heads, PartitionSpec(ROWS)), out_specs=heads, check_vma=False)(
      query, key, value, segments)  # a Pallas call does not say over which axes its result varies


def _splash_on_device(query: Array, key: Array, value: Array, segments: Array, interpret: bool) -> Array:
  heads, length, width = query.shape[1:]
  block, padded = _blocks(length)
  pad = lambda x, axis: jnp.pad(x, [(0, padded - length if n == axis else 0) for n in range(x.ndim)])
  blocks = {name: block for name in ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")}
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((padded, padded))] * heads)
  kernel = splash.make_splash_mha(mask, block_sizes=splash.BlockSizes(**blocks), head_shards=1, q_seq_shards=1,
                                  residual_checkpoint_name=ATTENTION, interpret=interpret)
  scaled = (query.astype(jnp.float32) / math.sqrt(width)).astype(query.dtype)
  ids = splash.SegmentIds(pad(segments, 1), pad(segments, 1))
  out = jax.vmap(kernel)(pad(scaled, 2), pad(key, 2), pad(value, 2), ids)
  return out[:, :, :length].astype(query.dtype)


def _blocks(length: int) -> tuple[int, int]:
  """(tokens of a block, tokens of the padded row): the fewest equal blocks that hold `length` tokens."""
  count = math.ceil(length / _LONGEST_BLOCK)
  block = _LANES * math.ceil(length / count / _LANES)
  return block, count * block
