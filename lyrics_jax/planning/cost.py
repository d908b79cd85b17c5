"""From a compiled program to seconds: the compiler's cycles, its collectives over the slice's links, and three bounds.

    time of a step = cycles / clock + Pallas kernels + collectives that nothing hides,
                     or the hidden ones alone where they take longer than all of that
    bounds         = model FLOPs / peak;  HBM bytes / bandwidth;  bytes sent / links

MFU (model FLOPs utilisation) counts what the model needs, 4 FLOPs per frozen parameter and token through which gradients
flow, 6 per trained one, and attention; what remat computes again is not counted (see `flops.py`).
"""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

from lyrics_jax.planning.compile import Program
from lyrics_jax.planning.flops import model_flops
from lyrics_jax.planning.hlo import Collective, Instruction
from lyrics_jax.planning.topology import Target

# Of the matrix units' peak, what splash attention is taken to reach: the compiler gives no cycles for Pallas kernels.
KERNEL_EFFICIENCY = 0.5
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products in each of splash attention's kernels


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All runs of the collectives of one kind over one mesh axis. `bytes` is the arrays', `sent` what a chip sends."""
  kind: str
  axis: str
  runs: int
  bytes: int
  sent: float
  seconds: float
  overlapped: bool


@dataclasses.dataclass(frozen=True)
class Cost:
  """Seconds of one step. `flops`: the model's, of the global batch."""
  flops: int
  cycles: float
  kernels: float
  collectives: tuple[Traffic, ...]
  compute_bound: float
  memory_bound: float

  @property
  def blocking(self) -> float:
    return sum(traffic.seconds for traffic in self.collectives if not traffic.overlapped)

  @property
  def overlapped(self) -> float:
    return sum(traffic.seconds for traffic in self.collectives if traffic.overlapped)

  @property
  def interconnect_bound(self) -> float:
    return self.blocking + self.overlapped

  @property
  def step(self) -> float:
    return max(self.cycles + self.kernels + self.blocking, self.interconnect_bound)

  @property
  def bound(self) -> float:
    return max(self.compute_bound, self.memory_bound, self.interconnect_bound)

  @property
  def mfu(self) -> float:
    return self.compute_bound / self.step


def cost_of(program: Program) -> Cost:
  layout, module = program.layout, program.module
  chip, mesh = layout.target.chip, layout.mesh
  flops = model_flops(layout.config)
  kernels = sum(kernel_flops(call) * times for call, times in module.kernels()) / (chip.flops * KERNEL_EFFICIENCY)
  return Cost(flops, module.cycles / chip.clock, kernels, traffic(module.collectives(mesh.size), layout.target, mesh),
              flops / mesh.size / chip.flops, module.traffic() / chip.hbm_bandwidth)


def traffic(collectives: list[Collective], target: Target, mesh: Mesh) -> tuple[Traffic, ...]:
  """Grouped by kind, mesh axis, and whether computation hides them; the dearest first."""
  groups = collections.defaultdict(list)
  for each in collectives:
    groups[each.kind, mesh_axis(each.groups, mesh), each.overlapped].append(each)
  result = [Traffic(kind, axis, sum(c.runs for c in each), sum(c.bytes * c.runs for c in each), sum(c.sent * c.runs for c in each),
                    sum(seconds(c, target, mesh) * c.runs for c in each), overlapped)
            for (kind, axis, overlapped), each in groups.items()]
  return tuple(sorted(result, key=lambda t: -t.seconds))


def seconds(collective: Collective, target: Target, mesh: Mesh) -> float:
  """Of one run, by bandwidth alone."""
  groups = [range(mesh.size)] if collective.groups is None else collective.groups.tolist()
  group = max(groups, key=lambda members: len(set(members)))  # a permutation may leave some devices' data where it is
  if len(set(group)) < 2:
    return 0.0
  links = target.links(mesh, group)
  return collective.sent / (links * target.chip.link_bandwidth if links else target.chip.dcn_bandwidth)


def mesh_axis(groups: np.ndarray | None, mesh: Mesh) -> str:
  """The mesh axes along which the members of a group differ, "data+fsdp"; "all" where the program names no groups."""
  if groups is None:
    return "all"
  places = np.unravel_index(groups, tuple(mesh.shape.values()))
  return "+".join(name for name, place in zip(mesh.axis_names, places) if (place != place[:, :1]).any()) or "none"


def kernel_flops(call: Instruction) -> float:
  """FLOPs of one call of a splash attention kernel, by its name and its query; half of the square, for causality.

  The query is the first operand that is not of integers: [B, H, T, d], or [H, T, d] of a single row. 0 for a kernel that this does
  not know.
  """
  kind = next((kind for kind in _PRODUCTS if f"splash_mha_{kind}" in call.name), None)
  query = re.search(r"\b(?:bf16|f16|f32)\[(\d+(?:,\d+){2,3})\]", call.rest)
  if kind is None or query is None:
    return 0.0
  *heads, length, width = map(int, query[1].split(","))
  return _PRODUCTS[kind] * 2 * math.prod((*heads, length, length, width)) / 2
