"""Other meshes, remat policies and microbatches for the same batch: which fit, and which is fastest."""

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import get_args

from lyrics_jax.config import Config
from lyrics_jax.models.layers.compute import Remat
from lyrics_jax.planning.compile import DoesNotFit, Layout, compile_step
from lyrics_jax.planning.cost import cost_of
from lyrics_jax.planning.report import Report
from lyrics_jax.planning.topology import Target
from lyrics_jax.training.parameters import ModelParameters
from refiner_export.common.settings import UserError

Changes = dict[str, object]  # dotted names of a configuration's fields, and their new values
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A variant of a configuration: its report, or the reason why there is none."""
  changes: Changes
  report: Report | None
  reason: str = ""

  @property
  def flags(self) -> str:
    """The changes as a command line has them."""
    return " ".join(f"--config.{name}={value}" for name, value in self.changes.items())

  @property
  def seconds(self) -> float:
    """The predicted step; infinite where there is no report."""
    return float("inf") if self.report is None else self.report.step_seconds

  def __str__(self) -> str:
    if self.report is None:
      return f"{self.flags}: {self.reason}"
    return f"{self.flags}: {self.report.step_seconds:.3f} s, MFU {self.report.mfu:.1%}"


def changed(config: Config, changes: Changes) -> Config:
  """A copy with dotted fields replaced, checked and locked. Raises `UserError`."""
  for name, value in changes.items():
    config = _replace(config, name.split("."), value)
  config.finalize()
  return config


def measure(config: Config, target: Target, changes: Changes) -> Outcome:
  """Compiles one variant, unless arithmetic alone shows that it cannot fit."""
  try:
    layout = Layout.of(changed(config, changes), target)
    if layout.least_bytes > target.chip.hbm:
      raise DoesNotFit(layout.least_bytes, target.chip.hbm)
    program = compile_step(layout)
    return Outcome(changes, Report.of(program, cost_of(program)))
  except UserError as error:
    return Outcome(changes, None, str(error))


def search(config: Config, target: Target, most: int, tell: Tell) -> list[Outcome]:
  """The variants that fit, the fastest first. At most `most` are compiled; one line is told after each.

  One choice follows the other: the mesh, then what remat keeps, then microbatches. Each starts from the best
  variant so far.
  """
  meshes = possible_meshes(config, target)
  tell(f"{len(meshes)} meshes may fit by arithmetic")
  if not meshes:
    return []
  attempts = _Attempts(config, target, most, tell)
  for mesh in meshes[:max(1, most // 2)]:
    attempts.add(mesh | {"compute.remat": config.compute.remat,
                         "optimizer.accumulate_steps": config.optimizer.accumulate_steps})
  best = attempts.best
  for remat in reversed(get_args(Remat)):
    attempts.add(best | {"compute.remat": remat})
  best = attempts.best
  for count in (1, 2, 4, 8):
    attempts.add(best | {"optimizer.accumulate_steps": count})
  return attempts.fitting


class _Attempts:
  """The variants that a search has compiled, in order."""

  def __init__(self, config: Config, target: Target, most: int, tell: Tell):
    self.config, self.target, self.most, self.tell = config, target, most, tell
    self.tried: list[Outcome] = []

  def add(self, changes: Changes) -> None:
    """Compiles a variant, unless it was compiled before or no more may be compiled."""
    if len(self.tried) == self.most or changes in map(operator.attrgetter("changes"), self.tried):
      return
    outcome = measure(self.config, self.target, changes)
    self.tried.append(outcome)
    self.tell(f"{len(self.tried)}/{self.most} {outcome}")

  @property
  def fitting(self) -> list[Outcome]:
    """The variants with a report, the fastest first."""
    ranked = sorted(self.tried, key=operator.attrgetter("seconds"))
    return [outcome for outcome in ranked if outcome.report is not None]

  @property
  def best(self) -> Changes:
    """The changes of the fastest variant; those of the first variant where none fits."""
    return (self.fitting or self.tried)[0].changes


def possible_meshes(config: Config, target: Target) -> list[Changes]:
  """The meshes that divide the batch and every parameter, and that may fit by arithmetic.

  Tensor parallelism costs time, so meshes with little of it stand first. Among equal meshes, the one that
  splits parameters least stands first, because it gathers least.
  """
  parameters, found = ModelParameters.of(config), []
  for data, fsdp, tensor in _meshes(len(target.devices)):
    mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    try:
      layout = Layout.of(changed(config, mesh), target, parameters)
    except UserError:
      continue
    if layout.least_bytes <= target.chip.hbm:
      found.append(mesh)
  return found


def remedy(config: Config, target: Target, tell: Tell) -> Outcome | None:
  """The first of the usual changes, alone and then together, with which the step fits; None where none helps."""
  for changes in _remedies(config, target):
    tell(f"trying {Outcome(changes, None).flags}")
    outcome = measure(config, target, changes)
    if outcome.report is not None:
      return outcome
  return None


def _remedies(config: Config, target: Target) -> Iterator[Changes]:
  """Each change alone, then together with all before it."""
  together = {}
  for change in _usual_changes(config, len(target.devices)):
    yield change
    if together:
      yield together | change
    together |= change


def _usual_changes(config: Config, chips: int) -> Iterator[Changes]:
  """In the order of their price: recomputation, gathering, smaller products, and last accuracy."""
  rows = config.batch_size // chips
  if config.compute.remat != "full":
    yield {"compute.remat": "full"}
  if chips > 1 and config.batch_size % chips == 0:
    yield {"mesh.data": 1, "mesh.fsdp": chips, "mesh.tensor": 1}
  if rows > config.optimizer.accumulate_steps:
    yield {"optimizer.accumulate_steps": rows}
  if config.compute.frozen_dtype != "int8":
    yield {"compute.frozen_dtype": "int8"}


def _meshes(chips: int) -> Iterator[tuple[int, int, int]]:
  """(data, fsdp, tensor) with fsdp and tensor powers of two; tensor is at most the four chips of a host."""
  for tensor in (1, 2, 4):
    rest, fsdp = chips // tensor, 1
    if chips % tensor:
      continue
    while fsdp <= rest:
      if rest % fsdp == 0:
        yield rest // fsdp, fsdp, tensor
      fsdp *= 2


def _replace(settings, path: list[str], value):
  if len(path) > 1:
    value = _replace(getattr(settings, path[0]), path[1:], value)
  return dataclasses.replace(settings, **{path[0]: value})
