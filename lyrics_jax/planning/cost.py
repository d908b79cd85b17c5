"""From a compiled program to seconds: the compiler's cycles, collectives over the slice's links, three bounds.

    time of a step = cycles / clock + Pallas kernels + collectives that nothing hides,
                     or the hidden collectives alone where they take longer than all of that
    bounds         = model FLOPs / peak;  HBM bytes / bandwidth;  bytes sent / links

MFU (model FLOPs utilisation) counts what the model needs: 4 FLOPs per token for a frozen parameter through
which gradients flow, 6 for a trained one, and attention. What remat computes again does not count (see
`flops.py`).
"""

import collections
import dataclasses
import math
import operator
import re

import numpy as np
from jax.sharding import Mesh

from lyrics_jax.planning.collectives import Collective, collectives_of
from lyrics_jax.planning.compile import Program
from lyrics_jax.planning.flops import model_flops
from lyrics_jax.planning.hbm import bytes_moved
from lyrics_jax.planning.hlo_text import Instruction
from lyrics_jax.planning.topology import Target

# The share of the matrix units' peak that splash attention is assumed to reach: the compiler has no cycles
# for Pallas kernels.
KERNEL_EFFICIENCY = 0.5
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products in each of splash attention's kernels


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All runs of the collectives of one kind over one mesh axis. `bytes`: of their arrays; `sent`: by one chip."""
  kind: str
  axis: str
  runs: int
  bytes: int
  sent: float
  seconds: float
  overlapped: bool


@dataclasses.dataclass(frozen=True)
class Cost:
  """Seconds of one step. `flops`: the model's, for the global batch."""
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
  flops, of_kernels = model_flops(layout.config), 0.0
  for call, times in module.kernels():
    of_kernels += kernel_flops(call) * times
  return Cost(
      flops, cycles=module.cycles / chip.clock, kernels=of_kernels / (chip.flops * KERNEL_EFFICIENCY),
      collectives=traffic(collectives_of(module, mesh.size), layout.target, mesh),
      compute_bound=flops / mesh.size / chip.flops, memory_bound=bytes_moved(module) / chip.hbm_bandwidth)


def traffic(collectives: list[Collective], target: Target, mesh: Mesh) -> tuple[Traffic, ...]:
  """Collectives in groups by kind, mesh axis, and whether computation hides them; the dearest group first."""
  groups = collections.defaultdict(list)
  for collective in collectives:
    groups[collective.kind, mesh_axis(collective.groups, mesh), collective.overlapped].append(collective)
  found = []
  for (kind, axis, overlapped), members in groups.items():
    runs, size, sent, spent = 0, 0, 0.0, 0.0
    for collective in members:
      runs += collective.runs
      size += collective.runs * collective.bytes
      sent += collective.runs * collective.sent
      spent += collective.runs * seconds(collective, target, mesh)
    found.append(Traffic(kind, axis, runs, size, sent, spent, overlapped))
  return tuple(sorted(found, key=operator.attrgetter("seconds"), reverse=True))


def seconds(collective: Collective, target: Target, mesh: Mesh) -> float:
  """Seconds of one run, by bandwidth alone."""
  groups = [list(range(mesh.size))] if collective.groups is None else collective.groups.tolist()
  largest = max(groups, key=_distinct)
  if _distinct(largest) < 2:
    return 0.0
  links = target.links(mesh, largest)
  return collective.sent / (links * target.chip.link_bandwidth if links else target.chip.dcn_bandwidth)


def _distinct(group: list[int]) -> int:
  """How many devices a group has. A permutation may name one twice: that device's data stays where it is."""
  return len(set(group))


def mesh_axis(groups: np.ndarray | None, mesh: Mesh) -> str:
  """The mesh axes along which the members of a group differ, such as "data+fsdp".

  "all" stands for a program that names no groups, "none" for groups of one.
  """
  if groups is None:
    return "all"
  axes = []
  for name, place in zip(mesh.axis_names, np.unravel_index(groups, tuple(mesh.shape.values()))):
    if (place != place[:, :1]).any():
      axes.append(name)
  return "+".join(axes) or "none"


def kernel_flops(call: Instruction) -> float:
  """FLOPs of one call of a splash attention kernel, from its name and its query; 0 for an unknown kernel.

  A causal kernel computes half of the square. The query is the first operand that is not of integers:
  [B, H, T, d], or [H, T, d] of a single row.
  """
  query = re.search(r"\b(?:bf16|f16|f32)\[(\d+(?:,\d+){2,3})\]", call.rest)
  kernel = re.search(f"splash_mha_({'|'.join(_PRODUCTS)})", call.name)
  if kernel is None or query is None:
    return 0.0
  *heads, length, width = map(int, query[1].split(","))
  return _PRODUCTS[kernel[1]] * 2 * math.prod((*heads, length, length, width)) / 2
