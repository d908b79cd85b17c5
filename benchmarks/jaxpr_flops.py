"""Floating point operations of a traced JAX function: its matrix products and convolutions, two per multiply-add."""

import math

import jax
from jax.extend import core


def count_flops(function, *arguments) -> int:
  """FLOPs of `function(*arguments)`; arguments may be abstract.

  Counted before XLA sees the function, so that a loop counts with its length and what a backward pass computes again
  counts again. Everything but matrix products and convolutions is left out, as in PyTorch's `FlopCounterMode`.
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
    depth = math.prod(kernel) // kernel[layout[0]]  # input channels of a group times the window
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)
  inner = [_of_jaxpr(jaxpr) for value in parameters.values() for jaxpr in _jaxprs(value)]
  if name == "while" and sum(inner):
    raise NotImplementedError("a matrix product in a loop of unknown length")
  if name == "cond":
    return max(inner)
  return sum(inner) * (parameters["length"] if name == "scan" else 1)


def _jaxprs(value) -> list[core.Jaxpr]:
  """The jaxprs in a parameter of an equation, which holds one, several or none."""
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  return [jaxpr for part in value for jaxpr in _jaxprs(part)] if isinstance(value, (tuple, list)) else []
