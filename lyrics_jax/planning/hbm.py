"""What an optimised program does with HBM: what loops keep there for later loops, and what it reads and writes."""

import collections

from lyrics_jax.planning.hlo import Module
from lyrics_jax.planning.hlo_text import Computation, Instruction, bytes_in_hbm, bytes_of

Use = tuple[Instruction, int]  # an instruction that reads an array, and as which of its operands

_MOVES = frozenset((
    "fusion", "copy", "copy-start", "convolution", "dot", "custom-call", "reduce", "transpose", "broadcast",
    "dynamic-slice", "dynamic-update-slice", "concatenate", "convert", "gather", "scatter", "sort"))


def kept_by_loops(module: Module) -> int:
  """Bytes in HBM that loops write and that later loops only read.

  In a train step these are what the forward passes of the layers keep for the backward passes.
  """
  total = 0
  for name in module.runs:
    users = _users(module.computations[name])
    for loop in module.inside(name):
      if loop.opcode == "while":
        only_read = _only_read(module, loop)
        for result, _ in users[loop.name]:
          written = result.opcode == "get-tuple-element" and result.element not in only_read
          if written and _read_by_a_loop(module, result, users):
            total += bytes_in_hbm(result.shape)
  return total


def _users(computation: Computation) -> dict[str, list[Use]]:
  """For every name in a computation, who reads it."""
  users = collections.defaultdict(list)
  for instruction in computation.values():
    for place, operand in enumerate(instruction.operands):
      users[operand].append((instruction, place))
  return users


def _only_read(module: Module, loop: Instruction) -> set[int]:
  """Which elements of its state a loop hands on as they are."""
  body = module.computations[loop.called["body"]]
  for instruction in body.values():
    if instruction.opcode == "parameter":
      state = instruction.name
    if instruction.root:
      root = instruction
  elements = set()
  for place, operand in enumerate(root.operands):
    result = body[operand]
    if result.opcode == "get-tuple-element" and result.operands == (state,) and result.element == place:
      elements.add(place)
  return elements


def _read_by_a_loop(module: Module, array: Instruction, users: dict[str, list[Use]]) -> bool:
  """Whether the array, or a copy of it, is an element of a loop's state that the loop only reads."""
  for user, place in users[array.name]:
    if user.opcode == "tuple":
      for loop, _ in users[user.name]:
        if loop.opcode == "while" and place in _only_read(module, loop):
          return True
    if user.opcode in ("bitcast", "copy", "copy-start", "copy-done") and _read_by_a_loop(module, user, users):
      return True
  return False


def bytes_moved(module: Module) -> int:
  """Bytes read from and written to HBM, about: the operands and results of every instruction that lie there.

  Where a fusion takes or replaces a slice of an array, only the slice counts.
  """
  total = 0
  for name, times in module.runs.items():
    computation = module.computations[name]
    for instruction in computation.values():
      if instruction.opcode in _MOVES:
        total += _moved(module, instruction, computation) * times
  return total


def _moved(module: Module, instruction: Instruction, computation: Computation) -> int:
  """Bytes that one run of an instruction of a computation moves."""
  fused = instruction.fused
  # The result of a copy-start names the operand again.
  total = 0 if instruction.opcode == "copy-start" else bytes_in_hbm(instruction.shape)
  for place, operand in enumerate(instruction.operands):
    size = bytes_in_hbm(computation[operand].shape) if operand in computation else 0
    uses = _uses_of_parameter(module, fused, place)
    if uses and all(user.opcode == "dynamic-update-slice" and n == 0 for user, n in uses):
      written = 0
      for user, _ in uses:
        written += bytes_of(module.computations[fused][user.operands[1]].shape)
      total += min(size, written) - size  # the result has the size of the operand, but only the update is written
    else:
      total += _bytes_read(module, fused, place, size)
  return max(0, total)


def _uses_of_parameter(module: Module, computation: str | None, parameter: int) -> list[Use]:
  """Who reads a parameter of a computation, whatever tiles the parameter is given before."""
  inside, names = module.inside(computation), set()
  for instruction in inside:
    if instruction.opcode == "parameter" and instruction.rest.startswith(f"{parameter})"):
      names.add(instruction.name)
  # A fusion of the parameter alone whose result lies where the parameter does only gives it other tiles. int8
  # arrays get such tiles before a slice is taken.
  for instruction in inside:
    if "output_to_operand_aliasing" in instruction.rest and names.issuperset(instruction.operands):
      names.add(instruction.name)
  uses = []
  for instruction in inside:
    if instruction.name not in names:
      for place, operand in enumerate(instruction.operands):
        if operand in names:
          uses.append((instruction, place))
  return uses


def _bytes_read(module: Module, computation: str | None, parameter: int, size: int) -> int:
  """Bytes that a fused computation reads of its parameter of `size` bytes. Fusions may stand in fusions."""
  uses = _uses_of_parameter(module, computation, parameter)
  if not uses:
    return size
  read = 0
  for user, place in uses:
    if user.opcode == "dynamic-slice":
      read += bytes_of(user.shape)
    elif user.opcode == "fusion":
      read += _bytes_read(module, user.fused, place, size)
    else:
      return size
  return min(size, read)
