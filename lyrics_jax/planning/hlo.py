"""An optimised program: how often each of its instructions runs, and on which of them the compiler expects cycles.

On a TPU every fusion and copy carries the `estimated_cycles` of one run. The compiler's own totals count the
body of a loop once, so this module multiplies by the loops' trip counts.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

from lyrics_jax.planning.hlo_text import Computation, Instruction, parse

_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")


@dataclasses.dataclass
class Module:
  """`computations` by name; the program starts with the one called `entry`."""
  computations: dict[str, Computation]
  entry: str

  @classmethod
  def parse(cls, text: str) -> "Module":
    """Raises `ValueError` for text that is no program."""
    return cls(*parse(text))

  def inside(self, computation: str | None) -> list[Instruction]:
    """The instructions of a computation; none for None."""
    return list(self.computations.get(computation, {}).values())

  def executed(self) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that runs by itself, with the number of its runs. A fusion is one; its insides are none."""
    for name, times in self.runs.items():
      for instruction in self.inside(name):
        yield instruction, times

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """How often each computation runs, for the computations whose instructions run one after the other."""
    counts = collections.Counter()

    def visit(name: str, times: int) -> None:
      counts[name] += times
      for instruction in self.inside(name):
        called = instruction.called
        if instruction.opcode == "while":
          visit(called["body"], times * self.trip_count(instruction))
        elif instruction.opcode in ("call", "async-start"):
          visit(called.get("calls") or called["to_apply"], times)
        elif instruction.opcode == "conditional":  # which branch is taken is unknown, so all count: an upper bound
          for several, one in _BRANCHES.findall(instruction.rest):
            for branch in re.findall(r"[\w.\-]+", several or one):
              visit(branch, times)

    visit(self.entry, 1)
    return dict(counts)

  def trip_count(self, loop: Instruction) -> int:
    """How often the body of a loop runs; 1 where the text does not say it.

    The number is the compiler's note, or else the only integer constant in the loop's condition.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(found[1])
    condition = self.inside(loop.called["condition"])
    for instruction in list(condition):
      condition += self.inside(instruction.called.get("calls"))
    constants = set()
    for instruction in condition:
      if instruction.opcode == "constant" and instruction.shape.startswith(("s32[]", "u32[]")):
        if found := re.match(r"(-?\d+)\)", instruction.rest):
          constants.add(int(found[1]))
    return constants.pop() if len(constants) == 1 else 1

  @property
  def cycles(self) -> int:
    """The compiler's estimate for the whole program, loops included."""
    return sum(instruction.cycles * times for instruction, times in self.executed())

  def dearest(self, count: int) -> list[tuple[str, int]]:
    """The operations with the most cycles, the dearest first, by the names that JAX gave them."""
    spent = collections.Counter()
    for instruction, times in self.executed():
      found = re.search(r'op_name="([^"]*)"', instruction.rest)
      spent[found[1] if found else instruction.name] += instruction.cycles * times
    return spent.most_common(count)

  def kernels(self) -> list[tuple[Instruction, int]]:
    """Calls of Pallas kernels with the number of their runs. The compiler has no cycles for them."""
    found = []
    for instruction, times in self.executed():
      if 'custom_call_target="tpu_custom_call"' in instruction.rest:
        found.append((instruction, times))
    return found
