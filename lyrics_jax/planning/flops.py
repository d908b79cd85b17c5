"""Floating point operations of a training step, counted in the traced function: matrix products and convolutions.

The count is what a step needs, not what a program computes: nothing is recomputed (`remat` none, logits in
one piece). A frozen parameter through which gradients flow costs 4 FLOPs per token: 2 forward, and 2 for the
gradient of its input. A trained parameter costs 6. The frozen image encoder costs 2, because nothing before
it is trained. Attention counts its whole square, as is the custom (Chowdhery et al. 2022, appendix B), with
one of its seven products computed twice, as the formulas of flash attention ask; the second computation is
under 1 % of a step with a language model.
"""

import dataclasses
import math

import jax
from jax.extend import core

from lyrics_jax.config import Config
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.training.parameters import ModelParameters


def model_flops(config: Config) -> int:
  """FLOPs of one update over the whole global batch, with texts of full length."""
  config = _without_recomputation(config)
  parameters = ModelParameters.of(config)
  trained, frozen = parameters.split(parameters.memory)
  microbatches = config.optimizer.accumulate_steps
  batch = {}
  for name, spec in config.batch_spec().items():
    batch[name] = jax.ShapeDtypeStruct((config.microbatch, *spec.shape[1:]), spec.dtype)

  def loss(trained, frozen, batch, key):
    return config.stage.loss(parameters.model(trained, frozen), batch, key).value

  key = jax.eval_shape(jax.random.key, 0)
  return microbatches * count_flops(jax.grad(loss), trained, frozen, batch, key)


def _without_recomputation(config: Config) -> Config:
  objectives = []
  for objective in config.stage.objectives:
    if isinstance(objective, NextToken):
      objective = dataclasses.replace(objective, chunk=config.data.llm_length)
    objectives.append(objective)
  return dataclasses.replace(
      config, stage=dataclasses.replace(config.stage, objectives=tuple(objectives)),
      compute=dataclasses.replace(config.compute, remat="none", attention="xla"))


def count_flops(function, *arguments) -> int:
  """FLOPs of a call; its arguments may be abstract. A multiply-add counts two, a loop as often as it runs.

  Raises:
    NotImplementedError: there is a matrix product in a loop of unknown length.
  """
  return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> int:
  return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation) -> int:
  name, parameters = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = parameters["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)
  if name == "conv_general_dilated":
    kernel, layout = equation.invars[1].aval.shape, parameters["dimension_numbers"].rhs_spec
    return 2 * math.prod(kernel) // kernel[layout[0]] * math.prod(equation.outvars[0].aval.shape)
  inner = []
  for value in parameters.values():
    inner += map(_of_jaxpr, _jaxprs(value))
  if name == "while" and sum(inner):
    raise NotImplementedError("a matrix product in a loop of unknown length")
  if name == "cond":
    return max(inner, default=0)
  return sum(inner) * (parameters["length"] if name == "scan" else 1)


def _jaxprs(value) -> list[core.Jaxpr]:
  """The jaxprs in a parameter of an equation. A parameter holds one, several or none."""
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  found = []
  if isinstance(value, (tuple, list)):
    for part in value:
      found += _jaxprs(part)
  return found
