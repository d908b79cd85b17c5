"""Floating point operations of a training step, counted in the traced function: matrix products and convolutions.

What a step needs, not what a program computes: nothing is recomputed (`remat` none, logits in one piece). So a frozen
parameter through which gradients flow costs 4 per token (forward, and the gradient of its input), a trained one 6, the frozen
image encoder, behind which nothing is trained, 2. Attention counts its whole square, as is the custom (Chowdhery et al. 2022, appendix B),
with one of its seven products computed twice, as the formulas of flash attention ask; that is under 1 % of a step of stage 2.
"""

import dataclasses
import math

import jax
from jax.extend import core

from lyrics_jax.config import Config
from lyrics_jax.stages import make_stage
from lyrics_jax.training.parameters import ParameterPlan


def model_flops(config: Config) -> int:
  """Of one update of the whole global batch with texts of full length."""
  stage = make_stage(dataclasses.replace(
      config, model=dataclasses.replace(config.model, remat="none", attention="xla"),
      instruct=dataclasses.replace(config.instruct, loss_chunk=config.data.llm_length)))
  plan = ParameterPlan.of(stage)
  trained, frozen = ({path: plan.shapes[path] for path in plan.paths(trained)} for trained in (True, False))
  microbatches = config.optimizer.accumulate_steps
  batch = {name: jax.ShapeDtypeStruct((spec.shape[0] // microbatches, *spec.shape[1:]), spec.dtype)
           for name, spec in stage.batch_spec().items()}
  gradient = jax.grad(lambda trained, frozen, batch, key: stage.loss(plan.model(trained, frozen), batch, key).value)
  return microbatches * count_flops(gradient, trained, frozen, batch, jax.eval_shape(lambda: jax.random.key(0)))


def count_flops(function, *arguments) -> int:
  """FLOPs of `function(*arguments)`, arguments may be abstract: two per multiply-add, a loop with its length.

  Raises `NotImplementedError` for a matrix product in a loop of unknown length.
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
  inner = [_of_jaxpr(jaxpr) for value in parameters.values() for jaxpr in _jaxprs(value)]
  if name == "while" and sum(inner):
    raise NotImplementedError("a matrix product in a loop of unknown length")
  return max(inner, default=0) if name == "cond" else sum(inner) * (parameters["length"] if name == "scan" else 1)


def _jaxprs(value) -> list[core.Jaxpr]:
  """The jaxprs in a parameter of an equation, which holds one, several or none."""
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  return [jaxpr for part in value for jaxpr in _jaxprs(part)] if isinstance(value, (tuple, list)) else []
