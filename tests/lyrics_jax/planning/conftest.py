"""A slice of eight chips for the planner, played by this process's eight CPU devices."""

import jax
import pytest
import tiny

from lyrics_jax.config import MeshConfig
from lyrics_jax.planning.chips import CHIPS
from lyrics_jax.planning.compile import Layout, Program, compile_step
from lyrics_jax.planning.topology import Target


@pytest.fixture(scope="session")
def target() -> Target:
  return Target("v5e:2x4", CHIPS["v5e"], (2, 4), {device: (0, n // 4, n % 4) for n, device in enumerate(jax.devices()[:8])})


@pytest.fixture(scope="session")
def program(target) -> Program:
  return compile_step(Layout.of(tiny.make_config("instruct", mesh=MeshConfig(2, 2, 2)), target))
