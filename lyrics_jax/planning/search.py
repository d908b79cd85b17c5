"""Other meshes, remat policies and microbatches for the same batch: which fit, which is fastest, what makes a program fit."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import get_args

from lyrics_jax.config import Config, Remat
from lyrics_jax.planning.compile import DoesNotFit, Layout, compile_step
from lyrics_jax.planning.cost import cost_of
from lyrics_jax.planning.report import Report
from lyrics_jax.planning.topology import Target
from lyrics_jax.stages import make_stage
from lyrics_jax.training.parameters import ParameterPlan
from refiner_export.common.settings import UserError


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A variant of a configuration: its report, or why it is none."""
  changes: dict[str, object]  # dotted fields that differ
  report: Report | None
  reason: str = ""

  @property
  def flags(self) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in self.changes.items())


def changed(config: Config, changes: dict[str, object]) -> Config:
  """A copy with dotted fields replaced, checked and locked. Raises `UserError`."""
  for name, value in changes.items():
    config = _replace(config, name.split("."), value)
  config.finalize()
  return config


def measure(config: Config, target: Target, changes: dict[str, object]) -> Outcome:
  """Compiles one variant, unless arithmetic alone shows that it cannot fit."""
  try:
    layout = Layout.of(changed(config, changes), target)
    if layout.least_bytes > target.chip.hbm:
      raise DoesNotFit(layout.least_bytes, target.chip.hbm)
    program = compile_step(layout)
    return Outcome(changes, Report.of(program, cost_of(program)))
  except UserError as error:
    return Outcome(changes, None, str(error))


def search(config: Config, target: Target, most: int, tell: Callable[[str], None]) -> list[Outcome]:
  """At most `most` compilations, one line told after each; those that fit, the fastest first.

  One choice after the other, each with the best of those before it: the mesh, then what remat keeps, then microbatches.
  """
  tried: list[Outcome] = []

  def attempt(several: list[dict[str, object]]) -> dict[str, object]:
    for changes in several:
      if len(tried) < most and all(changes != outcome.changes for outcome in tried):
        tried.append(outcome := measure(config, target, changes))
        tell(f"{len(tried)}/{most} {outcome.flags}: " + (
            outcome.reason if outcome.report is None else f"{outcome.report.step_seconds:.3f} s, MFU {outcome.report.mfu:.1%}"))
    fitting = _ranked(tried)
    return fitting[0].changes if fitting else several[0]

  meshes = possible_meshes(config, target)
  tell(f"{len(meshes)} meshes may fit by arithmetic")
  if not meshes:
    return []
  start = {"model.remat": config.model.remat, "optimizer.accumulate_steps": config.optimizer.accumulate_steps}
  best = attempt([mesh | start for mesh in meshes[:max(1, most // 2)]])
  best = attempt([best] + [best | {"model.remat": remat} for remat in reversed(get_args(Remat))])
  attempt([best] + [best | {"optimizer.accumulate_steps": count} for count in (1, 2, 4, 8)])
  return _ranked(tried)


def possible_meshes(config: Config, target: Target) -> list[dict[str, object]]:
  """Those that divide the batch and every parameter, and that arithmetic lets fit; little tensor parallelism, which costs time, first.

  Of equal ones the one that splits parameters least stands first: it gathers least.
  """
  plan, found = ParameterPlan.of(make_stage(config)), []
  for data, fsdp, tensor in _meshes(len(target.devices)):
    mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    try:
      layout = Layout.of(changed(config, mesh), target, plan)
    except UserError:
      continue
    if layout.least_bytes <= target.chip.hbm:
      found.append(mesh)
  return found


def remedy(config: Config, target: Target, tell: Callable[[str], None]) -> Outcome | None:
  """The first of the usual changes, alone and then together, with which the step fits; None where none does."""
  for changes in _remedies(config, target):
    tell(f"trying {' '.join(f'--config.{name}={value}' for name, value in changes.items())}")
    outcome = measure(config, target, changes)
    if outcome.report is not None:
      return outcome
  return None


def _remedies(config: Config, target: Target) -> Iterator[dict[str, object]]:
  """In the order of what they cost: time of recomputation, of gathering, of smaller products, then accuracy."""
  total, chips = {}, len(target.devices)
  rows = config.batch_size // chips
  for change in (
      {"model.remat": "full"} if config.model.remat != "full" else {},
      {"mesh.data": 1, "mesh.fsdp": chips, "mesh.tensor": 1} if chips > 1 and config.batch_size % chips == 0 else {},
      {"optimizer.accumulate_steps": rows} if rows > config.optimizer.accumulate_steps else {},
      {"model.frozen_dtype": "int8"} if config.model.frozen_dtype != "int8" else {}):
    if change:
      yield change
      if total:
        yield total | change
      total |= change


def _ranked(outcomes: list[Outcome]) -> list[Outcome]:
  return sorted((outcome for outcome in outcomes if outcome.report is not None), key=lambda outcome: outcome.report.step_seconds)


def _meshes(chips: int) -> Iterator[tuple[int, int, int]]:
  """(data, fsdp, tensor) in powers of two, tensor up to the four chips of a host."""
  for tensor in (1, 2, 4):
    if chips % tensor == 0:
      rest = chips // tensor
      yield from ((rest // fsdp, fsdp, tensor) for fsdp in (2**k for k in range(rest.bit_length())) if rest % fsdp == 0)


def _replace(settings, path: list[str], value):
  inner = value if len(path) == 1 else _replace(getattr(settings, path[0]), path[1:], value)
  return dataclasses.replace(settings, **{path[0]: inner})
