"""Each stage compiled once: its loss, and its gradients, as functions of parameters and a batch."""

import dataclasses
from collections.abc import Callable

import jax
import pytest
import tiny


@dataclasses.dataclass(frozen=True)
class Compiled:
  """`loss(parameters, batch)` and `gradient(trained, frozen, batch)` of a stage; the parameters have noise on biases and scales."""
  plan: object
  trained: dict
  frozen: dict
  loss: Callable
  gradient: Callable

  @property
  def parameters(self) -> dict:
    return self.trained | self.frozen


def compiled(stage: str, **changes) -> Compiled:
  config = tiny.make_config(stage, **changes)
  plan = tiny.make_plan(config)
  loss = lambda trained, frozen, batch: plan.stage.loss(plan.model(trained, frozen), batch, None)
  return Compiled(plan, *tiny.make_parameters(plan, spread=0.2),
                  jax.jit(lambda parameters, batch: loss(*plan.split(parameters), batch)),
                  jax.jit(jax.grad(lambda *inputs: loss(*inputs).value)))


@pytest.fixture(scope="session")
def align() -> Compiled:
  return compiled("align")


@pytest.fixture(scope="session")
def instruct() -> Compiled:
  return compiled("instruct")


@pytest.fixture(scope="session", name="compiled")
def _compiled():
  return compiled
