"""The reader of optimised programs: against programs compiled here for eight CPU devices, and text as a TPU's compiler writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lyrics_jax.planning import hlo
from lyrics_jax.planning.cost import mesh_axis

LAYERS = 5

# As libtpu 0.0.42 prints it, shortened: a loop of three around two fusions, one of which takes a slice of the stacked parameters.
TPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[3,64,128]{2,1,0:T(8,128)(2,1)})->bf16[64,128]{1,0}}

%fused_computation.1 (param_0.1: bf16[3,64,128], param_1.1: s32[]) -> bf16[64,128] {
  %param_0.1 = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)S(6)} parameter(1)
  %dynamic-slice.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,64,128}
  ROOT %bitcast.1 = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.1)
}

%fused_computation.2 (param_0.2: bf16[64,128]) -> bf16[64,128] {
  %param_0.2 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %add.2 = bf16[64,128]{1,0:T(8,128)(2,1)} add(%param_0.2, %param_0.2)
}

%body (arg: (s32[], bf16[3,64,128])) -> (s32[], bf16[3,64,128]) {
  %arg = (s32[]{:T(128)}, /*index=1*/bf16[3,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %all = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %fusion.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%all, %i), kind=kLoop, calls=%fused_computation.1, \
metadata={op_name="jit(f)/while/body/take"}, backend_config={"window_config":{"estimated_cycles":"100","iteration_bounds":["1"]}}
  %fusion.2 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%fusion.1), kind=kLoop, calls=%fused_computation.2, \
metadata={op_name="jit(f)/while/body/add"}, backend_config={"window_config":{"estimated_cycles":"30"}}
  %all-gather-start.1 = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%fusion.2), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, use_global_device_ids=true
  %all-gather-done.1 = bf16[256,128]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[3,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %all)
}

%condition (arg.1: (s32[], bf16[3,64,128])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  %arg.1 = (s32[]{:T(128)}, bf16[3,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %constant.1), direction=LT
}

ENTRY %main (p: bf16[3,64,128]) -> bf16[64,128] {
  %p = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[3,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero, %p)
  %while.1 = (s32[]{:T(128)}, bf16[3,64,128]{2,1,0:T(8,128)(2,1)}) while(%tuple.2), condition=%condition, body=%body
  %result = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
  ROOT %copy.9 = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%result), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((1, 2, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def compiled(mesh) -> hlo.Module:
  """A scan over five layers, whose kernels are split over `tensor` along their inputs, so that each product is summed over it."""
  at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))

  def f(x, kernels):
    step = lambda x, kernel: (jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), at("fsdp", None)), None)
    return jax.lax.scan(step, x, kernels)[0]

  shapes = (jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=at("fsdp", "tensor")),
            jax.ShapeDtypeStruct((LAYERS, 32, 32), jnp.float32, sharding=at(None, "tensor", None)))
  return hlo.Module.parse(jax.jit(f).lower(*shapes).compile().as_text())


def test_a_loop_body_runs_as_often_as_the_scan_is_long(compiled):
  assert LAYERS in compiled.runs.values()


def test_collectives_of_a_loop_with_their_axis_and_bytes(compiled, mesh):
  in_loop = [c for c in compiled.collectives(8) if c.runs == LAYERS and c.kind == "all-reduce"]
  assert [(mesh_axis(c.groups, mesh), c.bytes) for c in in_loop] == [("tensor", 16 // 2 * 32 * 4)]
  assert in_loop[0].sent == pytest.approx(2 * in_loop[0].bytes * 3 / 4)


def test_a_loop_that_the_compiler_made():
  """Products in pieces, as they arrive from the neighbours, are counted without a sign."""
  assert hlo.Module.parse(TPU.replace("s32[]", "u32[]")).runs == hlo.Module.parse(TPU).runs


def test_cycles_count_as_often_as_they_run():
  module = hlo.Module.parse(TPU)
  assert module.cycles == 3 * (100 + 30) + 7
  assert module.dearest(1) == [("jit(f)/while/body/take", 300)]


def test_a_started_gather_is_overlapped_and_counts_its_result_only():
  (gather,) = hlo.Module.parse(TPU).collectives(8)
  assert (gather.kind, gather.runs, gather.bytes, gather.overlapped) == ("all-gather", 3, 256 * 128 * 2, True)
  np.testing.assert_array_equal(gather.groups, [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_a_gather_that_goes_on_beside_several_fusions_counts_once():
  gather = "  %all-gather.{0} = bf16[64,128]{{1,0}} all-gather(%param_0.{0}), channel_id=7, replica_groups={{{{0,1}}}}, dimensions={{0}}\n}}\n"
  fused = "".join(f"%c.{n} (param_0.{n}: bf16[32,128]) -> bf16[64,128] {{\n  %param_0.{n} = bf16[32,128]{{1,0}} parameter(0)\n"
                  + gather.format(n) for n in range(3))
  steps = "".join(f"  %step.{n} = bf16[64,128]{{1,0}} fusion(%p), kind=kCustom, calls=%c.{n}\n" for n in range(3))
  module = hlo.Module.parse(f"HloModule jit_f\n\n{fused}\nENTRY %main (p: bf16[32,128]) -> bf16[64,128] {{\n"
                            f"  %p = bf16[32,128]{{1,0}} parameter(0)\n{steps}}}\n")
  (gather,) = module.collectives(2)
  assert (gather.runs, gather.bytes, gather.overlapped) == (1, 64 * 128 * 2, True)


def test_what_a_loop_keeps_for_a_later_one():
  """The cosines of each layer, as long as the backward pass is a loop that reads them."""
  def program(depth):
    return lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=depth)[0].sum()

  x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
  module = lambda function: hlo.Module.parse(jax.jit(function).lower(x).compile().as_text())
  assert module(jax.grad(program(LAYERS))).kept_by_loops() == LAYERS * 64 * 128 * 4
  assert module(program(LAYERS)).kept_by_loops() == 0
  assert module(jax.grad(jax.checkpoint(program(LAYERS)))).kept_by_loops() == LAYERS * 64 * 128 * 4


def test_traffic_counts_slices_and_leaves_out_the_cores_own_memory():
  row = 64 * 128 * 2
  read = row + 4  # of the stacked parameters one slice, and its index; the result stays in the core
  assert hlo.Module.parse(TPU).traffic() == 3 * (read + row) + (3 * row + row)


def test_traffic_of_a_slice_in_a_fusion_of_a_fusion():
  outer = """%outer (p.1: s32[], p.2: bf16[3,64,128]) -> bf16[64,128] {
  %p.1 = s32[]{:T(128)S(6)} parameter(0)
  %p.2 = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %fusion.0 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%p.2, %p.1), kind=kLoop, calls=%fused_computation.1
}

%body ("""
  nested = TPU.replace("%body (", outer, 1).replace("fusion(%all, %i), kind=kLoop, calls=%fused_computation.1", "fusion(%i, %all), kind=kLoop, calls=%outer")
  assert hlo.Module.parse(nested).traffic() == hlo.Module.parse(TPU).traffic()


def test_traffic_of_a_slice_of_an_array_that_was_given_other_tiles():
  """As int8 parameters are: a fusion of its own that moves nothing."""
  tiled = """%fused_computation.1 (param_0.1: bf16[3,64,128], param_1.1: s32[]) -> bf16[64,128] {"""
  assert tiled in TPU and "dynamic-slice(%param_0.1, " in TPU
  seen = TPU.replace("dynamic-slice(%param_0.1, ", "dynamic-slice(%fusion.9, ", 1).replace(
      "  %dynamic-slice.1 = ", "  %fusion.9 = bf16[3,64,128]{2,1,0:T(16,128)(2,1)} fusion(%param_0.1), kind=kLoop, "
      "output_to_operand_aliasing={{}: (0, {})}, calls=%copy_fusion\n  %dynamic-slice.1 = ", 1)
  assert hlo.Module.parse(seen).traffic() == hlo.Module.parse(TPU).traffic()


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
  np.testing.assert_array_equal(hlo.replica_groups(text, 4), groups)


def test_bytes_of_arrays_and_tuples():
  assert hlo.bytes_of("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
  assert hlo.bytes_of("(f32[], s4[8], pred[5], u32[2]{0:S(1)})") == 4 + 4 + 5 + 8
  assert hlo.in_hbm("(f32[], u32[2]{0:T(128)S(1)})") == 4


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.Module.parse("nothing")
