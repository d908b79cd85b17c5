"""The language model's causal self-attention over packed rows, and the choice of the kernel that computes it.

A row is one conversation or several behind each other; `segments` numbers them and is 0 on padding. A token sees the
tokens of its own segment up to itself. Padding sees padding, so that no query is blind and every kernel agrees.

  xla     `attention.attend_by_head` with a dense mask, on any device; always used with a cache.
  splash  JAX's Pallas kernel for TPUs. It needs no mask in memory and skips what causality hides. Under a mesh each
          device computes its own rows and heads. On other platforms it is interpreted, for tests.
  cudnn   the flash attention of NVIDIA's library, in 16 bits.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import AbstractMesh, PartitionSpec

from lyrics_jax.models.layers.attention import attend_by_head
from lyrics_jax.models.layers.compute import Kernel
from lyrics_jax.models.layers.parameter import Array
from lyrics_jax.models.layers.remat import ATTENTION
from lyrics_jax.sharding import HEADS, ROWS, batch_shards, heads_shards
from refiner_export.common.settings import require

_LANES = 128  # of a TPU's vector unit: a block of tokens is a multiple of it
_LONGEST_BLOCK = 512  # tokens; longer blocks skip less of the causal triangle and need more of the fast memory


class Heads(Protocol):
  """What a kernel asks of a language model's settings."""
  width: int
  heads: int
  kv_heads: int


def causal_attention(segments: Array, heads: Heads, kernel: Kernel, dtype: jnp.dtype) -> Callable:
  """A function of query [B, H, T, d], key and value [B, K, T, d] to [B, H, T, d], for rows of segments int32[B, T].

  The dense mask is made once for all layers, and only for a kernel that needs it. Raises `UserError`, see `select`.
  """
  chosen = select(kernel, segments.shape, heads, dtype)
  if chosen == "splash":
    return functools.partial(_splash, segments=segments)
  compute = _cudnn if chosen == "cudnn" else attend_by_head
  return functools.partial(compute, mask=causal_mask(segments))


def causal_mask(segments: Array, slot: int | Array = 0, rows: int | None = None) -> Array:
  """bool[B, 1, T, S] from int32[B, S]: what each of `rows` = T tokens (by default all) from `slot` on may see."""
  batch, slots = segments.shape
  rows = slots if rows is None else rows
  of_rows = jax.lax.dynamic_slice(segments, (0, slot), (batch, rows))
  before = jnp.arange(slots) <= slot + jnp.arange(rows)[:, None]
  return (before & (of_rows[:, :, None] == segments[:, None, :]))[:, None]


def segment_positions(segments: Array) -> Array:
  """int32[B, T]: each token's place in its segment, counted from 0."""
  place = jnp.arange(segments.shape[1], dtype=jnp.int32)
  begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
  return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)


def select(kernel: Kernel, shape: tuple[int, int], heads: Heads, dtype: jnp.dtype) -> str:
  """Which kernel computes for `shape` = (B, T): "xla", "splash" or "cudnn".

  "auto" is splash on a TPU, cudnn in bfloat16 on a GPU, and xla elsewhere or for shapes that these do not take. The
  platform is that of the current mesh (`jax.set_mesh`), which differs from this process's in ahead-of-time compiling.

  Raises:
    UserError: the kernel asked for does not take these shapes or this dtype.
  """
  mesh = jax.sharding.get_abstract_mesh()
  platform = _platform(mesh)
  batch, length = shape
  hindrance = {"splash": _splash_hindrance(batch, heads), "cudnn": _cudnn_hindrance(length, heads, dtype), "xla": ""}
  if kernel == "auto":
    # Heads narrower than half of the lanes would waste most of a TPU's vector unit.
    wide = heads.width // heads.heads % (_LANES // 2) == 0
    best = {"tpu": "splash" if wide else "xla", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
    return "xla" if hindrance[best] else best
  require(not hindrance[kernel], f"config.compute.attention={kernel}: {hindrance[kernel]}; use auto or xla")
  return kernel


def _platform(mesh: AbstractMesh) -> str:
  return jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.platform


def _splash_hindrance(batch: int, heads: Heads) -> str:
  """Why splash cannot run on the mesh in use; empty where it can."""
  if batch % batch_shards():
    return f"{batch} rows do not divide over config.mesh.data x config.mesh.fsdp = {batch_shards()} devices"
  if heads.kv_heads % heads_shards():
    return f"config.mesh.{HEADS}={heads_shards()} does not divide the language model's kv_heads={heads.kv_heads}"
  return ""


def _cudnn_hindrance(length: int, heads: Heads, dtype: jnp.dtype) -> str:
  width = heads.width // heads.heads
  if dtype != jnp.bfloat16:
    return "it needs config.compute.dtype=bfloat16"
  if width > 128 or width % 8:
    return f"heads of the language model are {width} wide, it takes multiples of 8 up to 128"
  return f"a conversation of {length} tokens is odd, its gradient takes even ones" if length % 2 else ""


def _cudnn(query: Array, key: Array, value: Array, mask: Array) -> Array:
  tokens_first = [x.transpose(0, 2, 1, 3) for x in (query, key, value)]
  return jax.nn.dot_product_attention(*tokens_first, mask=mask, implementation="cudnn").transpose(0, 2, 1, 3)


def _splash(query: Array, key: Array, value: Array, segments: Array) -> Array:
  mesh = jax.sharding.get_abstract_mesh()
  local = functools.partial(_splash_on_device, interpret=_platform(mesh) != "tpu")
  if mesh.empty:
    return local(query, key, value, segments)
  heads = PartitionSpec(ROWS, HEADS)
  sharded = jax.shard_map(local, in_specs=(heads, heads, heads, PartitionSpec(ROWS)), out_specs=heads,
                          check_vma=False)  # a Pallas call does not say over which axes its result varies
  return sharded(query, key, value, segments)


def _splash_on_device(query: Array, key: Array, value: Array, segments: Array, interpret: bool) -> Array:
  heads, length, width = query.shape[1:]
  block, padded = _blocks(length)
  sizes = splash.BlockSizes(block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
                            block_kv_dq=block)
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((padded, padded))] * heads)
  kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                  residual_checkpoint_name=ATTENTION, interpret=interpret)
  scaled = (query.astype(jnp.float32) / math.sqrt(width)).astype(query.dtype)
  ids = jnp.pad(segments, ((0, 0), (0, padded - length)))
  tokens = ((0, 0), (0, 0), (0, padded - length), (0, 0))
  out = jax.vmap(kernel)(jnp.pad(scaled, tokens), jnp.pad(key, tokens), jnp.pad(value, tokens),
                         splash.SegmentIds(ids, ids))
  return out[:, :, :length].astype(query.dtype)


def _blocks(length: int) -> tuple[int, int]:
  """(tokens of a block, tokens of the padded row): the fewest equal blocks that hold `length` tokens."""
  count = math.ceil(length / _LONGEST_BLOCK)
  block = _LANES * math.ceil(length / count / _LANES)
  return block, count * block
