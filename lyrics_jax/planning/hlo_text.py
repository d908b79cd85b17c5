"""Parses XLA's optimised program, which is text, into computations of instructions.

The text is that of `jax.stages.Compiled.as_text()`. `hlo.py` says how often each instruction runs and what it costs.
"""

import dataclasses
import math
import re

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    shape: as text, such as `bf16[64,128]{1,0:T(8,128)(2,1)}`; a tuple has several arrays.
    operands: names of instructions in the same computation.
    rest: what follows the operands: attributes, metadata and the backend's configuration.
    root: whether the result of this instruction is the computation's result.
  """
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  root: bool = False

  @property
  def cycles(self) -> int:
    """The compiler's estimate for one run; 0 where the compiler gives none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(found[1]) if found else 0

  @property
  def called(self) -> dict[str, str]:
    """Names of the computations that this instruction calls, by attribute: calls, to_apply, condition, body."""
    return dict(_CALLED.findall(self.rest))

  @property
  def fused(self) -> str | None:
    """Name of the computation inside a fusion; None for every other instruction."""
    return self.called.get("calls") if self.opcode == "fusion" else None

  @property
  def element(self) -> int:
    """Which element of a tuple a `get-tuple-element` takes."""
    return int(re.search(r"index=(\d+)", self.rest)[1])


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """All computations by name, and the name of the one that the program starts with.

  Raises:
    ValueError: the text is no program.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if found := _INSTRUCTION.match(line):
      if current is not None:
        current[found[2]] = _instruction(found, line)
    elif found := _HEADER.match(line):
      current = computations[found[2]] = {}
      entry = found[2] if found[1] else entry
  if entry is None:
    raise ValueError("no ENTRY computation in the program's text")
  return computations, entry


def _instruction(found: re.Match, line: str) -> Instruction:
  text = line[found.end():]
  end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
  shape, call = text[:end], text[end:].lstrip()
  opcode, _, arguments = call.partition("(")
  if opcode in ("parameter", "constant"):  # the parentheses hold a number, which belongs to `rest`
    return Instruction(found[2], shape, opcode, (), arguments, bool(found[1]))
  close = _closing("(" + arguments) - 1
  operands = tuple(re.findall(r"%([\w.\-]+)", arguments[:close]))
  return Instruction(found[2], shape, opcode, operands, arguments[close + 1:], bool(found[1]))


def _closing(text: str) -> int:
  """Index of the parenthesis that closes the one with which `text` begins."""
  depth = 0
  for place in re.finditer(r"[()]", text):
    depth += 1 if place[0] == "(" else -1
    if depth == 0:
      return place.start()
  raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def sizes_of(shape: str) -> list[int]:
  """Bytes of every array in a shape. The padding of tiles does not count."""
  sizes = []
  for dtype, dimensions, _ in _ARRAY.findall(shape):
    sizes.append(_bytes(dtype, dimensions))
  return sizes


def bytes_of(shape: str) -> int:
  """Bytes of all arrays in a shape. The padding of tiles does not count."""
  return sum(sizes_of(shape))


def bytes_in_hbm(shape: str) -> int:
  """Bytes of the arrays that lie in HBM. `S(1)`, or a higher number, in a layout stands for the core's memory."""
  total = 0
  for dtype, dimensions, layout in _ARRAY.findall(shape):
    if "S(" not in layout:
      total += _bytes(dtype, dimensions)
  return total


def _bytes(dtype: str, dimensions: str) -> int:
  bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
  return bits * math.prod(map(int, filter(None, dimensions.split(",")))) // 8
