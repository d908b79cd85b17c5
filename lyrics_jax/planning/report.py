"""A plan as numbers (JSON), as lines for a person, and as a picture."""

import dataclasses

from lyrics_jax.config import Config
from lyrics_jax.planning.compile import CONVERSATION, GIB, Program
from lyrics_jax.planning.cost import Cost
from refiner_export.pages import plan as page


@dataclasses.dataclass(frozen=True)
class Report:
  """A plan. Rates are of the whole slice, memory is per chip; texts have full length, and shorter ones cost less.

  Attributes:
    run: the run's directory, `config.output`.
    tokens_per_chip: positions of the text that the model reads in a step, padding included.
    trained, frozen: numbers of parameters.
    hbm: bytes by kind; hbm_capacity: bytes that a chip has.
    flops_per_step: the model's, of the global batch.
    dearest: the operations that take longest, with their seconds per step.
    seconds: of a step, its parts and its bounds.
  """
  run: str
  topology: str
  chips: int
  mesh: dict[str, int]
  batch_size: int
  accumulate_steps: int
  remat: str
  frozen_dtype: str
  tokens_per_chip: int
  trained: int
  frozen: int
  hbm: dict[str, int]
  hbm_capacity: float
  flops_per_step: int
  collectives: tuple[dict, ...]
  dearest: tuple[tuple[str, float], ...]
  seconds: dict[str, float]
  step_seconds: float
  mfu: float
  tokens_per_second: float
  images_per_second: float
  steps: int
  chip_hours: float
  compile_seconds: float

  @classmethod
  def of(cls, program: Program, cost: Cost) -> "Report":
    layout, config, chip = program.layout, program.layout.config, program.layout.target.chip
    tokens = config.batch_size * text_length(config)
    dearest = []
    for name, cycles in program.module.dearest(8):
      dearest.append((name, cycles / chip.clock))
    return cls(
        run=config.output, topology=layout.target.name, chips=layout.mesh.size, mesh=dict(layout.mesh.shape),
        batch_size=config.batch_size, accumulate_steps=config.optimizer.accumulate_steps, remat=config.compute.remat,
        frozen_dtype=config.compute.frozen_dtype, tokens_per_chip=tokens // layout.mesh.size,
        trained=layout.parameters.count(True), frozen=layout.parameters.count(False), hbm=program.hbm,
        hbm_capacity=chip.hbm, flops_per_step=cost.flops, dearest=tuple(dearest),
        collectives=tuple(map(dataclasses.asdict, cost.collectives)),
        seconds={"fusions": cost.cycles, "Pallas kernels": cost.kernels, "blocking collectives": cost.blocking,
                 "overlapped collectives": cost.overlapped, "bound: compute": cost.compute_bound,
                 "bound: HBM": cost.memory_bound, "bound: interconnect": cost.interconnect_bound},
        step_seconds=cost.step, mfu=cost.mfu, tokens_per_second=tokens / cost.step,
        images_per_second=config.batch_size / cost.step, steps=config.steps,
        chip_hours=config.steps * cost.step * layout.mesh.size / 3600, compile_seconds=program.seconds)

  @property
  def hbm_used(self) -> int:
    """Bytes per chip."""
    return sum(self.hbm.values())

  def lines(self) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
    lines = [
        f"{self.run} on {self.topology}, {self.chips} chips: {mesh}; batch {self.batch_size} in "
        f"{self.accumulate_steps} microbatches, {self.tokens_per_chip:,} tokens per chip; remat {self.remat}, frozen "
        f"in {self.frozen_dtype}",
        f"parameters             {self.trained:,} trained, {self.frozen:,} frozen",
        f"HBM per chip           {self.hbm_used / GIB:.2f} of {self.hbm_capacity / GIB:.0f} GiB"]
    for kind, size in self.hbm.items():
      lines.append(f"  {kind:28}{size / GIB:8.2f} GiB")
    lines.append(f"FLOPs per step         {self.flops_per_step:.4g} (the model's; what remat repeats is not counted)")
    lines.append("collectives per step   kind, mesh axis, runs, arrays' bytes, seconds")
    for group in self.collectives:
      overlapped = " overlapped" if group["overlapped"] else ""
      lines.append(f"  {group['kind']:20}{group['axis']:16}{group['runs']:8}{group['bytes'] / GIB:10.2f} GiB"
                   f"{group['seconds'] * 1e3:10.1f} ms{overlapped}")
    lines.append("time per step")
    for part, seconds in self.seconds.items():
      lines.append(f"  {part:28}{seconds * 1e3:10.1f} ms")
    lines.append("dearest operations")
    for name, seconds in self.dearest:
      lines.append(f"  {seconds * 1e3:10.1f} ms  {name}")
    days = self.steps * self.step_seconds / 86400
    lines.append(f"predicted              {self.step_seconds:.3f} s per step, MFU {self.mfu:.1%}, "
                 f"{self.tokens_per_second:,.0f} tokens/s, {self.images_per_second:,.0f} images/s")
    lines.append(f"the schedule           {self.steps:,} steps: {days:.1f} days, {self.chip_hours:,.0f} chip-hours")
    return lines

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)

  def picture(self) -> bytes:
    """A PNG of what fills the HBM, and of where the time of a step goes."""
    memory, parts, bounds = {}, {}, {}
    for kind, size in self.hbm.items():
      memory[kind] = size / GIB
    for name, seconds in self.seconds.items():
      if name.startswith("bound: "):
        bounds[name.removeprefix("bound: ")] = seconds * 1e3
      elif name != "overlapped collectives":  # they go on beside the other parts
        parts[name] = seconds * 1e3
    title = (f"{self.run} on {self.topology}: {self.step_seconds:.3f} s per step, MFU {self.mfu:.1%}, "
             f"{self.chip_hours:,.0f} chip-hours")
    return page.draw(title, memory, self.hbm_capacity / GIB, parts, bounds)


def text_length(config: Config) -> int:
  """Text positions of one row, padding included: its conversations, or else spatial representation and caption."""
  sizes = config.dimensions
  return sizes.conversation if CONVERSATION in config.fields else sizes.spatial + sizes.caption
