"""The arithmetic of a plan: FLOPs, links, seconds, memory."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lyrics_jax.config import MeshConfig
from lyrics_jax.planning.chips import CHIPS, chip_of
from lyrics_jax.planning.compile import DoesNotFit, Layout, compile_step
from lyrics_jax.planning.cost import Cost, Traffic, cost_of, kernel_flops
from lyrics_jax.planning.flops import count_flops, model_flops
from lyrics_jax.planning.hlo import Instruction
from lyrics_jax.planning.picture import draw
from lyrics_jax.planning.report import Report
from lyrics_jax.planning.topology import Target
from lyrics_jax.training.sharding import global_batch
from lyrics_jax.training.step import initial_state
from refiner_export.common.settings import UserError


def test_flops_of_a_loop_count_with_its_length():
  x, kernels = jnp.ones((3, 4)), jnp.ones((5, 4, 4))
  assert count_flops(lambda x, kernels: jax.lax.scan(lambda x, k: (x @ k, None), x, kernels)[0], x, kernels) == 5 * 2 * 3 * 4 * 4


def test_a_trained_parameter_costs_two_flops_more_than_a_frozen_one():
  config = {train: tiny.make_config("instruct", model__llm__train=train) for train in ("full", "frozen")}
  llm, tokens = config["full"].model.llm, config["full"].batch_size * config["full"].data.llm_length
  kernels = llm.layers * (4 * llm.width**2 + 3 * llm.width * llm.mlp_dim) + llm.width * llm.vocab_size
  assert model_flops(config["full"]) - model_flops(config["frozen"]) == 2 * kernels * tokens


@pytest.mark.parametrize("changes", [{"model__remat": "full"}, {"optimizer__accumulate_steps": 2}, {"instruct__loss_chunk": 4}])
def test_what_is_computed_again_is_not_the_models(changes):
  assert model_flops(tiny.make_config("instruct", **changes)) == model_flops(tiny.make_config("instruct"))


def test_resident_bytes_are_those_of_the_real_arrays(program):
  layout = program.layout
  trained, frozen = layout.plan.initialise(layout.mesh, 0)
  state = initial_state(layout.plan, layout.optimizer, layout.mesh, trained)
  batch = global_batch(layout.mesh, tiny.make_batch(layout.config))
  of_one = lambda tree: sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(tree))
  assert layout.resident == {"parameters, frozen": of_one(frozen), "parameters, trained": of_one(state.parameters),
                             "optimizer": of_one(state.optimizer), "batch": of_one(batch)}


def test_report_of_a_whole_program(program):
  report = Report.of(program, cost_of(program))
  assert report.chips == 8 and report.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
  assert sum(report.hbm.values()) > sum(program.layout.resident.values()) > 0
  axes = {c["axis"] for c in report.collectives}
  assert axes and all(set(axis.split("+")) <= {"data", "fsdp", "tensor"} for axis in axes)
  assert report.chip_hours == pytest.approx(report.steps * report.step_seconds * 8 / 3600)
  assert f"{report.trained:,} trained" in "\n".join(report.lines())
  assert draw(report).startswith(b"\x89PNG")


def test_a_step_takes_what_nothing_hides_or_the_hidden_part_alone():
  moved = lambda seconds, overlapped: Traffic("all-gather", "fsdp", 1, 1, 1.0, seconds, overlapped)
  cost = Cost(1, 3.0, 1.0, (moved(0.5, False), moved(2.0, True)), 2.25, 0.1)
  assert cost.step == 4.5 and cost.mfu == 0.5
  assert dataclasses.replace(cost, collectives=(moved(9.0, True),)).step == 9.0


@pytest.mark.parametrize("rows, query", [(1, "40,512,128"), (16, "16,40,512,128")])
def test_flops_of_a_kernel(rows, query):
  """Of forward's two products half of the square; before the query stand integers that say which blocks are seen."""
  call = Instruction("splash_mha_fwd_segmented_residuals.1", "f32[512,128]", "custom-call", (),
                     f"...), operand_layout_constraints={{s8[1,1,1]{{2,1,0}}, bf16[{query}]{{2,1,0}}, bf16[{query}]{{2,1,0}}}}")
  assert kernel_flops(call) == rows * 40 * 2 * 2 * 512 * 512 * 128 / 2
  assert kernel_flops(dataclasses.replace(call, name="another")) == 0


@pytest.mark.parametrize("group, links", [([0, 1, 2, 3], 2), ([0, 4], 1), (list(range(8)), 3), ([0, 8], 0)])
def test_links_of_a_group(group, links):
  """A v5p slice of 2 x 4 chips: the long side is a ring, the short one is not; a second slice is behind the network."""
  target = Target("v5p:2x4", CHIPS["v5p"], (2, 4), {n: (n // 8, n // 4 % 2, n % 4) for n in range(16)})
  assert target.links(types.SimpleNamespace(devices=np.arange(16).reshape(2, 8)), group) == links


def test_batch_that_the_chips_do_not_divide(target):
  with pytest.raises(UserError, match="4 examples per microbatch are not a multiple of the 8 devices"):
    Layout.of(tiny.make_config("instruct", optimizer__accumulate_steps=2, mesh=MeshConfig(8, 1, 1)), target)


def test_unknown_chip():
  with pytest.raises(UserError, match="--topology=v9:2x2: no such TPU; known are v4, v5e"):
    chip_of("v9:2x2")


@pytest.mark.parametrize("message", [
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm "
    "capacity by 4.50G.",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.25G) exceeds available HBM (15.75G)."])
def test_a_program_that_is_too_large_says_by_how_much(target, message, monkeypatch):
  def refuse(*_, **__):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
  with pytest.raises(DoesNotFit, match="needs 20.2 GiB of HBM per chip, 4.5 GiB more than the 15.8 GiB"):
    compile_step(Layout.of(tiny.make_config("instruct", mesh=MeshConfig(8, 1, 1)), target))
