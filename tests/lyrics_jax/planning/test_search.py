"""What is tried when a step does not fit, and in search of the fastest. A rule takes the compiler's place."""

import pytest
import tiny

from lyrics_jax.planning import search
from lyrics_jax.planning.compile import DoesNotFit
from lyrics_jax.planning.search import changed
from lyrics_jax.sharding import MeshSettings


@pytest.fixture
def compiler(monkeypatch, program):
  """`compiler(fits)`: programs fit by this rule of their configurations; returns the list of what was compiled."""

  def install(fits):
    compiled = []

    def compile_by_rule(layout):
      compiled.append(layout.config)
      if not fits(layout.config):
        raise DoesNotFit(20 * 2**30, 16 * 2**30)
      return program

    monkeypatch.setattr(search, "compile_step", compile_by_rule)
    return compiled

  return install


def ignore(line: str) -> None:
  """In the place of a person who is told what is tried."""


def config(**changes):
  return tiny.make_config("instruct", batch_size=16, mesh=MeshSettings(8, 1, 1), **changes)


def test_remedies_alone_and_together(compiler, target):
  def fits(config):
    return config.compute.remat == "full" and config.mesh.fsdp == 8

  compiler(fits)
  assert search.remedy(config(), target, ignore).changes == {
      "compute.remat": "full", "mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1}


def test_nothing_helps(compiler, target):
  compiled = compiler(lambda c: False)
  assert search.remedy(config(), target, ignore) is None
  assert {c.compute.frozen_dtype for c in compiled} == {"float32", "int8"}


def test_search_compiles_no_more_than_it_may(compiler, target):
  lines, compiled = [], compiler(lambda c: c.mesh.fsdp > 1)
  outcomes = search.search(config(), target, 5, lines.append)
  assert len(compiled) == 5 and outcomes
  assert all(outcome.changes["mesh.fsdp"] > 1 for outcome in outcomes)
  assert len({outcome.flags for outcome in outcomes}) == len(outcomes)
  assert any("4.0 GiB more than the 16.0 GiB" in line for line in lines)


def test_meshes_that_do_not_divide_are_not_compiled(target):
  meshes = search.possible_meshes(tiny.make_config("instruct", batch_size=4, mesh=MeshSettings(1, 4, 2)), target)
  assert meshes and all(mesh["mesh.data"] * mesh["mesh.fsdp"] <= 4 for mesh in meshes)


def test_changed_leaves_the_original(target):
  original = config()
  assert changed(original, {"compute.remat": "full"}).compute.remat == "full" and original.compute.remat == "none"
