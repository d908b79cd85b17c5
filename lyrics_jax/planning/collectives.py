"""The collectives of an optimised program: what each moves, how often, and between which devices."""

import dataclasses
import math
import re

import numpy as np

from lyrics_jax.planning.hlo import Module
from lyrics_jax.planning.hlo_text import Instruction, sizes_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective. `bytes`: of its arrays; `sent`: bytes that each device sends; both are of one run.

  `groups`: int[groups, members] of places in the flat mesh; None where the program names none of equal size.
  `overlapped`: the program starts and awaits it at different places, so that it can run beside computation.
  """
  kind: str
  name: str
  bytes: int
  sent: float
  runs: int
  groups: np.ndarray | None
  overlapped: bool


def collectives_of(module: Module, devices: int) -> list[Collective]:
  """The collectives of a program for `devices` devices.

  A collective that is fused to products stands in several fusions: in the one that starts it, in all beside
  which it goes on, and in the one that ends it. All of them name the same channel, so it counts once.
  """
  found, asynchronous = [], _asynchronous(module)
  for name, times in module.runs.items():
    channels = set()
    for instruction in module.inside(name):
      if _is_collective(instruction):
        found.append(_collective(instruction, times, devices, overlapped=name in asynchronous))
      for fused in module.inside(instruction.fused):
        if _is_collective(fused):
          channel = _channel(fused)
          if channel is None or channel not in channels:
            found.append(_collective(fused, times, devices, overlapped=True))
          channels.add(channel)
  return found


def _is_collective(instruction: Instruction) -> bool:
  return instruction.opcode.removesuffix("-start") in KINDS


def _asynchronous(module: Module) -> set[str]:
  """Names of the computations that run beside the computation that starts them."""
  names = set()
  for computation in module.computations.values():
    for instruction in computation.values():
      if instruction.opcode == "async-start":
        names.add(instruction.called.get("calls"))
  return names


def _channel(instruction: Instruction) -> str | None:
  found = re.search(r"channel_id=(\d+)", instruction.rest)
  return found[1] if found else None


def _collective(instruction: Instruction, runs: int, devices: int, overlapped: bool) -> Collective:
  kind, started = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
  groups = replica_groups(instruction.rest, devices)
  arrays = sizes_of(instruction.shape)
  if started and kind == "all-gather":  # (operands, results)
    arrays = arrays[len(arrays) // 2:]
  elif started and kind == "collective-permute":  # (operand, result, two flags)
    arrays = arrays[1:2]
  size, members = sum(arrays), devices if groups is None else groups.shape[1]
  return Collective(kind, instruction.name, size, _sent(kind, size, members), runs, groups, overlapped or started)


def _sent(kind: str, size: int, members: int) -> float:
  """Bytes that each of `members` devices sends, where the collective's arrays have `size` bytes."""
  if kind == "collective-permute":
    return size
  if kind == "reduce-scatter":  # the arrays are the results, of which every device has its share
    return size * (members - 1)
  share = size * (members - 1) / members
  return 2 * share if kind == "all-reduce" else share


def replica_groups(text: str, devices: int) -> np.ndarray | None:
  """int[groups, members] in any of the forms that XLA writes; None where the text names no groups of equal size."""
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
    return _groups_of_axes(*found.groups())
  if found := re.search(r"replica_groups=(\[\d+,\d+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
    return _iota(found[1])
  if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", text):
    groups = list(map(_numbers, re.findall(r"\{([\d,]+)\}", found[1])))
    return np.array(groups) if len(set(map(len, groups))) == 1 else None
  return np.arange(devices)[None] if "replica_groups={}" in text else None


def _groups_of_axes(mesh: str, order: str, chosen: str) -> np.ndarray | None:
  """Groups that are written as axes of a mesh.

  Args:
    mesh: the axes and their sizes, such as `'a'=2,'b'=4`.
    order: how devices lie in the mesh, such as `, device_ids=([2,4]T(1,0))`; blank where they lie by number.
    chosen: the axes along which the members of a group differ, such as `'b'`. An axis that is used in part reads
      `'x':(before)size`: the axis splits into (before, size, rest).
  """
  axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
  parts = {}
  for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen):
    parts.setdefault(name, (int(before or 1), int(size or axes[name])))
  shape, members, others = [], [], []
  for name, size in axes.items():
    before, part = parts.get(name, (1, 1))
    place = len(shape)
    shape += [before, part, size // (before * part)]
    others += [place, place + 2]
    (members if name in parts else others).append(place + 1)
  if not members:
    return None
  devices = _devices(order, math.prod(shape)).reshape(shape)
  count = math.prod(shape[place] for place in members)
  return devices.transpose(*sorted(others), *members).reshape(-1, count)


def _devices(order: str, count: int) -> np.ndarray:
  """int[count]: the devices of a mesh, in the order in which the mesh has them."""
  if found := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", order):
    return np.arange(count).reshape(_numbers(found[1])).transpose(_numbers(found[2])).reshape(-1)
  if found := re.search(r"device_ids=\(([\d,]+)\)", order):
    return np.array(_numbers(found[1]))
  return np.arange(count)


def _iota(text: str) -> np.ndarray:
  """Groups that are written as [groups,members]<=[base]T(order)."""
  shape, base, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  ids = np.arange(math.prod(_numbers(base))).reshape(_numbers(base))
  return (ids if order is None else ids.transpose(_numbers(order))).reshape(_numbers(shape))


def _numbers(text: str) -> list[int]:
  return list(map(int, text.split(",")))
