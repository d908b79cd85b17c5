"""A slice of eight chips for the planner; this process's eight CPU devices take the chips' places."""

import jax
import pytest
import tiny

from lyrics_jax.planning.chips import CHIPS
from lyrics_jax.planning.compile import Layout, Program, compile_step
from lyrics_jax.planning.topology import Target
from lyrics_jax.sharding import MeshSettings


@pytest.fixture(scope="session")
def target() -> Target:
  places = {}
  for number, device in enumerate(jax.devices()[:8]):
    places[device] = (0, number // 4, number % 4)
  return Target("v5e:2x4", CHIPS["v5e"], (2, 4), places)


@pytest.fixture(scope="session")
def program(target) -> Program:
  return compile_step(Layout.of(tiny.make_config("instruct", mesh=MeshSettings(2, 2, 2)), target))
