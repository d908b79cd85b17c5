"""Each stage compiled once: its loss, and its gradients, as functions of parameters and a batch."""

import dataclasses
from collections.abc import Callable

import jax
import pytest
import tiny

from lyrics_jax.training.parameters import ModelParameters


@dataclasses.dataclass(frozen=True)
class Compiled:
  """`loss(parameters, batch)` and `gradient(trained, frozen, batch)` of a stage.

  The parameters have noise on biases and scales.
  """
  plan: ModelParameters
  trained: dict
  frozen: dict
  loss: Callable
  gradient: Callable

  @property
  def parameters(self) -> dict:
    return self.trained | self.frozen


def compiled(stage: str, gradients: bool = False, **changes) -> Compiled:
  """With `gradients` one program gives both, else `gradient` compiles another."""
  plan = tiny.make_plan(tiny.make_config(stage, **changes))

  def objective(trained, frozen, batch):
    loss = plan.config.stage.loss(plan.model(trained, frozen), batch, None)
    return loss.value, loss

  both = jax.jit(jax.grad(objective, has_aux=True))
  alone = jax.jit(lambda *inputs: objective(*inputs)[1])
  return Compiled(plan, *tiny.make_parameters(plan, spread=0.2),
                  lambda parameters, batch: (both(*plan.split(parameters), batch)[1] if gradients
                                             else alone(*plan.split(parameters), batch)),
                  lambda *inputs: both(*inputs)[0])


@pytest.fixture(scope="session")
def align() -> Compiled:
  return compiled("align", gradients=True)


@pytest.fixture(scope="session")
def instruct() -> Compiled:
  return compiled("instruct", gradients=True)


@pytest.fixture(scope="session", name="compiled")
def _compiled():
  return compiled
