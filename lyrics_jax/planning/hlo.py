"""Reads XLA's optimised program, as text: computations, how often each runs, the compiler's cycles, and what it moves.

The text is that of `jax.stages.Compiled.as_text()`. On a TPU every fusion and copy carries the `estimated_cycles` of one run;
the compiler's own totals count the body of a loop once, so they are multiplied with the loops' trip counts here.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str  # attributes, metadata, backend configuration
  root: bool = False

  @property
  def cycles(self) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(found[1]) if found else 0

  @property
  def called(self) -> dict[str, str]:
    return dict(_CALLED.findall(self.rest))


@dataclasses.dataclass(frozen=True)
class Collective:
  """`sent`: bytes that each device sends in one run; `groups`: int[groups, members] of places in the flat mesh, or None."""
  kind: str
  name: str
  bytes: int
  sent: float
  runs: int
  groups: np.ndarray | None
  overlapped: bool  # started and awaited apart, so that it can run beside computation


@dataclasses.dataclass
class Module:
  computations: dict[str, dict[str, Instruction]]
  entry: str

  @classmethod
  def parse(cls, text: str) -> "Module":
    """Raises `ValueError` for text that is no program."""
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
    return cls(computations, entry)

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """How often the computations that are run one instruction after the other are run; fusions' insides are not among them."""
    counts = collections.Counter()

    def visit(name: str, times: int) -> None:
      counts[name] += times
      for instruction in self.computations[name].values():
        called = instruction.called
        if instruction.opcode == "while":
          visit(called["body"], times * self.trip_count(instruction))
        elif instruction.opcode in ("call", "async-start"):
          visit(called.get("calls") or called["to_apply"], times)
        elif instruction.opcode == "conditional":  # which branch is taken is unknown: all, so that it is an upper bound
          for several, one in _BRANCHES.findall(instruction.rest):
            for branch in re.findall(r"[\w.\-]+", several or one):
              visit(branch, times)

    visit(self.entry, 1)
    return dict(counts)

  def trip_count(self, loop: Instruction) -> int:
    """From the compiler's note, or else the constant that the loop's condition compares with; 1 if there is none or are several."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(found[1])
    condition = self.computations[loop.called["condition"]].values()
    inside = [i for c in condition for i in self.computations.get(c.called.get("calls"), {}).values()]
    constants = {int(found[1]) for i in [*condition, *inside]
                 if i.opcode == "constant" and (found := re.match(r"(-?\d+)\)", i.rest)) and i.shape.startswith(("s32[]", "u32[]"))}
    return constants.pop() if len(constants) == 1 else 1

  @property
  def cycles(self) -> int:
    return sum(i.cycles * times for name, times in self.runs.items() for i in self.computations[name].values())

  def dearest(self, count: int) -> list[tuple[str, int]]:
    """The operations, by the name that JAX gave them, on which most cycles are spent."""
    spent = collections.Counter()
    for name, times in self.runs.items():
      for i in self.computations[name].values():
        found = re.search(r'op_name="([^"]*)"', i.rest)
        spent[found[1] if found else i.name] += i.cycles * times
    return spent.most_common(count)

  def kernels(self) -> list[tuple[Instruction, int]]:
    """Calls of Pallas kernels, for which the compiler has no cycles, and how often they run."""
    return [(i, times) for name, times in self.runs.items() for i in self.computations[name].values()
            if 'custom_call_target="tpu_custom_call"' in i.rest]

  def collectives(self, devices: int) -> list[Collective]:
    """Each as often as it runs. One that is fused to products stands in the fusion that starts it, in all beside which it goes
    on, and in that which ends it, every time under the same channel: it counts once."""
    found = []
    for name, times in self.runs.items():
      wrapped, fused = name in self._asynchronous, set()
      for i in self.computations[name].values():
        inside = self.computations.get(i.called.get("calls"), {}).values() if i.opcode == "fusion" else ()
        for c in (i, *inside):
          if c.opcode.removesuffix("-start") not in KINDS:
            continue
          channel = re.search(r"channel_id=(\d+)", c.rest) if c is not i else None
          if channel is None or channel[1] not in fused:
            found.append(_collective(c, times, devices, wrapped or c is not i))
          fused |= {channel[1]} if channel else set()
    return found

  @functools.cached_property
  def _asynchronous(self) -> set[str]:
    return {i.called.get("calls") for c in self.computations.values() for i in c.values() if i.opcode == "async-start"}

  def kept_by_loops(self) -> int:
    """Bytes in HBM that loops write and later loops only read: of a step, what the layers' forward passes keep for the backward ones."""
    total = 0
    for name in self.runs:
      users = collections.defaultdict(list)
      for i in self.computations[name].values():
        for place, operand in enumerate(i.operands):
          users[operand].append((i, place))
      for loop in (i for i in self.computations[name].values() if i.opcode == "while"):
        only_read = self._handed_on(loop)
        written = (i for i, _ in users[loop.name] if i.opcode == "get-tuple-element" and _index(i) not in only_read)
        total += sum(in_hbm(i.shape) for i in written if self._read_by_a_loop(i, users))
    return total

  def _handed_on(self, loop: Instruction) -> set[int]:
    """Which elements of its state a loop only reads."""
    body = self.computations[loop.called["body"]]
    state, = (i.name for i in body.values() if i.opcode == "parameter")
    root, = (i for i in body.values() if i.root)
    return {n for n, operand in enumerate(root.operands)
            if body[operand].opcode == "get-tuple-element" and body[operand].operands == (state,) and _index(body[operand]) == n}

  def _read_by_a_loop(self, array: Instruction, users: dict[str, list[tuple[Instruction, int]]]) -> bool:
    """Whether a loop's state has the array, perhaps copied, as an element that the loop only reads."""
    for user, place in users[array.name]:
      if user.opcode == "tuple" and any(i.opcode == "while" and place in self._handed_on(i) for i, _ in users[user.name]):
        return True
      if user.opcode in ("bitcast", "copy", "copy-start", "copy-done") and self._read_by_a_loop(user, users):
        return True
    return False

  def traffic(self) -> int:
    """Bytes read from and written to HBM, about: every instruction's operands and results that lie there.

    Of an array of which a fusion takes or replaces a slice only the slice counts.
    """
    return sum(self._moved(i, self.computations[name]) * times
               for name, times in self.runs.items() for i in self.computations[name].values()
               if i.opcode in ("fusion", "copy", "copy-start", "convolution", "dot", "custom-call", "reduce", "transpose", "broadcast",
                               "dynamic-slice", "dynamic-update-slice", "concatenate", "convert", "gather", "scatter", "sort"))

  def _moved(self, instruction: Instruction, around: dict[str, Instruction]) -> int:
    fused = instruction.called.get("calls") if instruction.opcode == "fusion" else None
    total = 0 if instruction.opcode == "copy-start" else in_hbm(instruction.shape)  # a start's result names the operand again
    for n, operand in enumerate(instruction.operands):
      size = in_hbm(around[operand].shape) if operand in around else 0
      users = self._users(fused, n)
      if users and all(i.opcode == "dynamic-update-slice" and k == 0 for i, k in users):
        update = min(size, sum(bytes_of(self.computations[fused][i.operands[1]].shape) for i, _ in users))
        total += update - size  # of the result, too, only the update is written
      else:
        total += self._read(fused, n, size)
    return max(0, total)

  def _users(self, computation: str | None, parameter: int) -> list[tuple[Instruction, int]]:
    """The instructions of a computation that take its parameter, under whatever tiles, and as which of their operands."""
    inside = self.computations.get(computation, {}).values()
    names = {i.name for i in inside if i.opcode == "parameter" and i.rest.startswith(f"{parameter})")}
    # A fusion of this parameter alone, whose result is where it was, only gives it other tiles, as int8 ones get before a slice.
    names |= {i.name for i in inside if names.issuperset(i.operands) and "output_to_operand_aliasing" in i.rest}
    return [(i, k) for i in inside if i.name not in names for k, operand in enumerate(i.operands) if operand in names]

  def _read(self, computation: str | None, parameter: int, size: int) -> int:
    """Bytes that a fused computation reads of its parameter of `size` bytes; fusions stand in fusions."""
    users = self._users(computation, parameter)
    if not users or any(i.opcode not in ("dynamic-slice", "fusion") for i, _ in users):
      return size
    return min(size, sum(bytes_of(i.shape) if i.opcode == "dynamic-slice" else self._read(i.called.get("calls"), k, size)
                         for i, k in users))


def _index(element: Instruction) -> int:
  """Of a get-tuple-element."""
  return int(re.search(r"index=(\d+)", element.rest)[1])


def bytes_of(shape: str) -> int:
  """Bytes of an array's or a tuple's shape, as HLO writes it; padding of tiles is left out."""
  return sum(_bits(dtype) * math.prod(map(int, filter(None, sizes.split(",")))) for dtype, sizes, _ in _SHAPE.findall(shape)) // 8


def in_hbm(shape: str) -> int:
  """The same of the arrays that lie in HBM, not in the core's own memory (`S(1)` and up in the layout)."""
  return sum(bytes_of(f"{dtype}[{sizes}]") for dtype, sizes, layout in _SHAPE.findall(shape) if "S(" not in layout)


def replica_groups(text: str, devices: int) -> np.ndarray | None:
  """int[groups, members] in any of the forms that XLA writes; None where the text names no groups of equal size."""
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ids = np.arange(math.prod(sizes.values()))
    if order := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", found[2]):
      ids = ids.reshape(_numbers(order[1])).transpose(_numbers(order[2])).reshape(-1)
    elif order := re.search(r"device_ids=\(([\d,]+)\)", found[2]):
      ids = np.array(_numbers(order[1]))
    axes, shape, chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[3]), [], []
    for name, size in sizes.items():  # an axis may be used in part: 'x':(before)size
      parts = [(int(before or 1), int(part or size)) for axis, before, part in axes if axis == name]
      before, part = parts[0] if parts else (1, 1)
      shape += [before, part, size // (before * part)]
      chosen += [len(shape) - 2] if parts else []
    if not chosen:
      return None
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    return ids.reshape(shape).transpose(*rest, *chosen).reshape(-1, math.prod(shape[axis] for axis in chosen))
  if found := re.search(r"replica_groups=(\[\d+,\d+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
    return _iota(found[1])
  if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", text):
    groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    return np.array(groups) if len({len(group) for group in groups}) == 1 else None
  return np.arange(devices)[None] if "replica_groups={}" in text else None


def _iota(text: str) -> np.ndarray:
  """[groups,members]<=[base]T(order)."""
  shape, base, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  ids = np.arange(math.prod(_numbers(base))).reshape(_numbers(base))
  return (ids if order is None else ids.transpose(_numbers(order))).reshape(_numbers(shape))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]


def _instruction(found: re.Match, line: str) -> Instruction:
  text = line[found.end():]
  end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
  shape, call = text[:end], text[end:].lstrip()
  opcode, _, arguments = call.partition("(")
  if opcode in ("parameter", "constant"):
    return Instruction(found[2], shape, opcode, (), arguments, bool(found[1]))
  close = _closing("(" + arguments) - 1
  return Instruction(found[2], shape, opcode, tuple(re.findall(r"%([\w.\-]+)", arguments[:close])), arguments[close + 1:], bool(found[1]))


def _closing(text: str) -> int:
  """Where the parenthesis that `text` begins with is closed."""
  depth = 0
  for place in re.finditer(r"[()]", text):
    depth += 1 if place[0] == "(" else -1
    if depth == 0:
      return place.start()
  raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _bits(dtype: str) -> int:
  return _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])


def _collective(instruction: Instruction, runs: int, devices: int, overlapped: bool) -> Collective:
  kind, started = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
  groups = replica_groups(instruction.rest, devices)
  arrays = [bytes_of(f"{dtype}[{sizes}]") for dtype, sizes, _ in _SHAPE.findall(instruction.shape)]
  if started and kind == "all-gather":  # (operands, results)
    arrays = arrays[len(arrays) // 2:]
  elif started and kind == "collective-permute":  # (operand, result, two flags)
    arrays = arrays[1:2]
  size, members = sum(arrays), devices if groups is None else groups.shape[1]
  share = (members - 1) / members
  sent = {"all-gather": size * share, "all-reduce": 2 * size * share, "reduce-scatter": size * (members - 1),
          "collective-permute": size}.get(kind, size * share)
  return Collective(kind, instruction.name, size, sent, runs, groups, overlapped or started)
