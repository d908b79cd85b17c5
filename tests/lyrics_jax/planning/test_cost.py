"""The arithmetic of a plan: FLOPs, links, seconds, memory."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lyrics_jax.planning.chips import CHIPS, chip_of
from lyrics_jax.planning.compile import DoesNotFit, Layout, compile_step
from lyrics_jax.planning.cost import Cost, Traffic, cost_of, kernel_flops
from lyrics_jax.planning.flops import count_flops, model_flops
from lyrics_jax.planning.hlo_text import Instruction
from lyrics_jax.planning.report import Report, text_length
from lyrics_jax.planning.topology import Target
from lyrics_jax.sharding import MeshSettings, global_batch
from lyrics_jax.training.step import initial_state
from refiner_export.common.settings import UserError


def test_flops_of_a_loop_count_with_its_length():
  def product(x, kernel):
    return x @ kernel, None

  def loop(x, kernels):
    return jax.lax.scan(product, x, kernels)[0]

  assert count_flops(loop, jnp.ones((3, 4)), jnp.ones((5, 4, 4))) == 5 * 2 * 3 * 4 * 4


def test_a_trained_parameter_costs_two_flops_more_than_a_frozen_one():
  trained = tiny.make_config("instruct", stage__model__llm__lora=None, stage__train=tiny.FULL)
  frozen = tiny.make_config("instruct", stage__model__llm__lora=None, stage__train=("connector/*",))
  llm, tokens = trained.stage.model.llm, trained.batch_size * trained.data.llm_length
  kernels = llm.layers * (4 * llm.width**2 + 3 * llm.width * llm.mlp_dim) + llm.width * llm.vocab_size
  assert model_flops(trained) - model_flops(frozen) == 2 * kernels * tokens


@pytest.mark.parametrize("changes", [
    {"compute__remat": "full"}, {"optimizer__accumulate_steps": 2}, {"stage__objectives__0__chunk": 4}])
def test_what_is_computed_again_is_not_the_models(changes):
  assert model_flops(tiny.make_config("instruct", **changes)) == model_flops(tiny.make_config("instruct"))


def test_resident_bytes_are_those_of_the_real_arrays(program):
  layout = program.layout
  trained, frozen = layout.parameters.initialise(layout.mesh, 0)
  state = initial_state(layout.parameters, layout.optimizer, layout.mesh, trained)
  batch = global_batch(layout.mesh, tiny.make_batch(layout.config))

  def of_one_device(tree) -> int:
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(tree))

  assert layout.resident == {
      "parameters, frozen": of_one_device(frozen), "parameters, trained": of_one_device(state.parameters),
      "optimizer": of_one_device(state.optimizer), "batch": of_one_device(batch)}


def test_report_of_a_whole_program(program):
  report = Report.of(program, cost_of(program))
  assert report.chips == 8 and report.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
  assert sum(report.hbm.values()) > sum(program.layout.resident.values()) > 0
  axes = {c["axis"] for c in report.collectives}
  assert axes and all(set(axis.split("+")) <= {"data", "fsdp", "tensor"} for axis in axes)
  assert report.chip_hours == pytest.approx(report.steps * report.step_seconds * 8 / 3600)
  assert f"{report.trained:,} trained" in "\n".join(report.lines())
  assert report.picture().startswith(b"\x89PNG")


@pytest.mark.parametrize("stage, length", [("instruct", 16), ("llava", 16), ("align", 10 + 8)])
def test_positions_of_a_row(stage, length):
  assert text_length(tiny.make_config(stage)) == length


@pytest.mark.parametrize("stage", ["align", "llava"])
def test_least_bytes_of_any_stage(stage, target):
  layout = Layout.of(tiny.make_config(stage), target)
  model, kept = layout.config.stage.model, 0
  if stage == "llava":
    kept = model.llm.layers * model.llm.width * 2 * layout.config.data.llm_length  # one row a device
  assert layout.least_bytes == sum(layout.resident.values()) + layout.resident["parameters, trained"] + kept


def test_a_step_takes_what_nothing_hides_or_the_hidden_part_alone():
  blocking = Traffic("all-gather", "fsdp", 1, 1, 1.0, seconds=0.5, overlapped=False)
  hidden = dataclasses.replace(blocking, seconds=2.0, overlapped=True)
  cost = Cost(1, 3.0, 1.0, (blocking, hidden), 2.25, 0.1)
  assert cost.step == 4.5 and cost.mfu == 0.5
  assert dataclasses.replace(cost, collectives=(dataclasses.replace(hidden, seconds=9.0),)).step == 9.0


@pytest.mark.parametrize("rows, query", [(1, "40,512,128"), (16, "16,40,512,128")])
def test_flops_of_a_kernel(rows, query):
  """The forward pass has two products of half of the square. Integers before the query say which blocks are seen."""
  operands = f"s8[1,1,1]{{2,1,0}}, bf16[{query}]{{2,1,0}}, bf16[{query}]{{2,1,0}}"
  call = Instruction("splash_mha_fwd_segmented_residuals.1", "f32[512,128]", "custom-call", (),
                     f"...), operand_layout_constraints={{{operands}}}")
  assert kernel_flops(call) == rows * 40 * 2 * 2 * 512 * 512 * 128 / 2
  assert kernel_flops(dataclasses.replace(call, name="another")) == 0


@pytest.mark.parametrize("group, links", [([0, 1, 2, 3], 2), ([0, 4], 1), (list(range(8)), 3), ([0, 8], 0)])
def test_links_of_a_group(group, links):
  """A v5p slice of 2 x 4 chips: the long side is a ring, the short side is not. The network leads to a second slice."""
  places = {n: (n // 8, n // 4 % 2, n % 4) for n in range(16)}
  target = Target("v5p:2x4", CHIPS["v5p"], (2, 4), places)
  assert target.links(types.SimpleNamespace(devices=np.arange(16).reshape(2, 8)), group) == links


def test_batch_that_the_chips_do_not_divide(target):
  with pytest.raises(UserError, match="4 examples per microbatch are not a multiple of the 8 devices"):
    Layout.of(tiny.make_config("instruct", optimizer__accumulate_steps=2, mesh=MeshSettings(8, 1, 1)), target)


def test_unknown_chip():
  with pytest.raises(UserError, match="--topology=v9:2x2: no such TPU; known are v4, v5e"):
    chip_of("v9:2x2")


@pytest.mark.parametrize("message", [
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.25G of 15.75G "
    "hbm. Exceeded hbm capacity by 4.50G.",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.25G) exceeds "
    "available HBM (15.75G)."])
def test_a_program_that_is_too_large_says_by_how_much(target, message, monkeypatch):
  def refuse(*_, **__):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
  with pytest.raises(DoesNotFit, match="needs 20.2 GiB of HBM per chip, 4.5 GiB more than the 15.8 GiB"):
    compile_step(Layout.of(tiny.make_config("instruct", mesh=MeshSettings(8, 1, 1)), target))
