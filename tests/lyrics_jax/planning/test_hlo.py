"""The reader of optimised programs, on programs compiled here for eight CPU devices and on text of a TPU's compiler."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lyrics_jax.planning.collectives import collectives_of, replica_groups
from lyrics_jax.planning.cost import mesh_axis
from lyrics_jax.planning.hbm import bytes_moved, kept_by_loops
from lyrics_jax.planning.hlo import Module
from lyrics_jax.planning.hlo_text import bytes_in_hbm, bytes_of

LAYERS = 5

# libtpu 0.0.42 printed it, shortened: a loop of three around two fusions. One takes a slice of stacked parameters.
TPU = (pathlib.Path(__file__).parent / "loop.hlo").read_text()


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((1, 2, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def compiled(mesh) -> Module:
  """A scan over five layers. Kernels are split over `tensor` along their inputs, so each product is summed over it."""
  def at(*axes):
    return NamedSharding(mesh, PartitionSpec(*axes))

  def step(x, kernel):
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), at("fsdp", None)), None

  def f(x, kernels):
    return jax.lax.scan(step, x, kernels)[0]

  shapes = (jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=at("fsdp", "tensor")),
            jax.ShapeDtypeStruct((LAYERS, 32, 32), jnp.float32, sharding=at(None, "tensor", None)))
  return Module.parse(jax.jit(f).lower(*shapes).compile().as_text())


def test_a_loop_body_runs_as_often_as_the_scan_is_long(compiled):
  assert LAYERS in compiled.runs.values()


def test_collectives_of_a_loop_with_their_axis_and_bytes(compiled, mesh):
  in_loop = [c for c in collectives_of(compiled, 8) if c.runs == LAYERS and c.kind == "all-reduce"]
  (reduction,) = in_loop
  assert (mesh_axis(reduction.groups, mesh), reduction.bytes) == ("tensor", 16 // 2 * 32 * 4)
  assert reduction.sent == pytest.approx(2 * reduction.bytes * 3 / 4)


def test_a_loop_that_the_compiler_made():
  """A loop over products in pieces, which arrive from the neighbours, counts without a sign."""
  assert Module.parse(TPU.replace("s32[]", "u32[]")).runs == Module.parse(TPU).runs


def test_cycles_count_as_often_as_they_run():
  module = Module.parse(TPU)
  assert module.cycles == 3 * (100 + 30) + 7
  assert module.dearest(1) == [("jit(f)/while/body/take", 300)]


def test_a_started_gather_is_overlapped_and_counts_its_result_only():
  (gather,) = collectives_of(Module.parse(TPU), 8)
  assert (gather.kind, gather.runs, gather.bytes, gather.overlapped) == ("all-gather", 3, 256 * 128 * 2, True)
  np.testing.assert_array_equal(gather.groups, [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_a_gather_that_goes_on_beside_several_fusions_counts_once():
  computations = steps = ""
  for n in range(3):
    computations += f"""%c.{n} (param_0.{n}: bf16[32,128]) -> bf16[64,128] {{
  %param_0.{n} = bf16[32,128]{{1,0}} parameter(0)
  %all-gather.{n} = bf16[64,128]{{1,0}} all-gather(%param_0.{n}), channel_id=7, replica_groups={{{{0,1}}}}
}}
"""
    steps += f"  %step.{n} = bf16[64,128]{{1,0}} fusion(%p), kind=kCustom, calls=%c.{n}\n"
  module = Module.parse(f"HloModule jit_f\n\n{computations}\nENTRY %main (p: bf16[32,128]) -> bf16[64,128] {{\n"
                        f"  %p = bf16[32,128]{{1,0}} parameter(0)\n{steps}}}\n")
  (gather,) = collectives_of(module, 2)
  assert (gather.runs, gather.bytes, gather.overlapped) == (1, 64 * 128 * 2, True)


def test_what_a_loop_keeps_for_a_later_one():
  """The loop keeps the cosines of each layer, as long as the backward pass is a loop that reads them."""
  def sine(carry, _):
    return jnp.sin(carry), None

  def layers(x):
    return jax.lax.scan(sine, x, length=LAYERS)[0].sum()

  def kept(function) -> int:
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    return kept_by_loops(Module.parse(jax.jit(function).lower(x).compile().as_text()))

  assert kept(jax.grad(layers)) == LAYERS * 64 * 128 * 4
  assert kept(layers) == 0
  assert kept(jax.grad(jax.checkpoint(layers))) == LAYERS * 64 * 128 * 4


def test_traffic_counts_slices_and_leaves_out_the_cores_own_memory():
  row = 64 * 128 * 2
  read = row + 4  # one slice of the stacked parameters, and its index; the result stays in the core
  assert bytes_moved(Module.parse(TPU)) == 3 * (read + row) + (3 * row + row)


def test_traffic_of_a_slice_in_a_fusion_of_a_fusion():
  outer = """%outer (p.1: s32[], p.2: bf16[3,64,128]) -> bf16[64,128] {
  %p.1 = s32[]{:T(128)S(6)} parameter(0)
  %p.2 = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %fusion.0 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%p.2, %p.1), kind=kLoop, calls=%fused_computation.1
}

%body ("""
  nested = TPU.replace("%body (", outer, 1).replace(
      "fusion(%all, %i), kind=kLoop, calls=%fused_computation.1", "fusion(%i, %all), kind=kLoop, calls=%outer")
  assert bytes_moved(Module.parse(nested)) == bytes_moved(Module.parse(TPU))


def test_traffic_of_a_slice_of_an_array_that_was_given_other_tiles():
  """int8 parameters are given other tiles, in a separate fusion that moves nothing."""
  tiled = """%fused_computation.1 (param_0.1: bf16[3,64,128], param_1.1: s32[]) -> bf16[64,128] {"""
  assert tiled in TPU and "dynamic-slice(%param_0.1, " in TPU
  seen = TPU.replace("dynamic-slice(%param_0.1, ", "dynamic-slice(%fusion.9, ", 1).replace(
      "  %dynamic-slice.1 = ", "  %fusion.9 = bf16[3,64,128]{2,1,0:T(16,128)(2,1)} fusion(%param_0.1), kind=kLoop, "
      "output_to_operand_aliasing={{}: (0, {})}, calls=%copy_fusion\n  %dynamic-slice.1 = ", 1)
  assert bytes_moved(Module.parse(seen)) == bytes_moved(Module.parse(TPU))


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}, x", [[3, 1], [2, 0]]),
    ("replica_groups={}, x", [[0, 1, 2, 3]]),
    ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
])
def test_replica_groups_in_every_form(text, groups):
  np.testing.assert_array_equal(replica_groups(text, 4), groups)


def test_bytes_of_arrays_and_tuples():
  assert bytes_of("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
  assert bytes_of("(f32[], s4[8], pred[5], u32[2]{0:S(1)})") == 4 + 4 + 5 + 8
  assert bytes_in_hbm("(f32[], u32[2]{0:T(128)S(1)})") == 4


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match="ENTRY"):
    Module.parse("nothing")
