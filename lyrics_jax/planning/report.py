"""A plan as numbers (JSON) and as lines for a person."""

import dataclasses

from lyrics_jax.planning.compile import Program
from lyrics_jax.planning.cost import Cost

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
  """Rates are of the whole slice, memory is per chip, both with texts of full length: shorter ones cost less."""
  stage: str
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
  dearest: tuple[tuple[str, float], ...]  # operations and their seconds per step
  seconds: dict[str, float]  # of a step: its parts and its bounds
  step_seconds: float
  mfu: float
  tokens_per_second: float
  images_per_second: float
  steps: int
  chip_hours: float
  compile_seconds: float

  @classmethod
  def of(cls, program: Program, cost: Cost) -> "Report":
    layout, config = program.layout, program.layout.config
    tokens = config.batch_size * text_length(config)
    chip = layout.target.chip
    return cls(
        stage=config.stage, topology=layout.target.name, chips=layout.mesh.size, mesh=dict(layout.mesh.shape),
        batch_size=config.batch_size, accumulate_steps=config.optimizer.accumulate_steps, remat=config.model.remat,
        frozen_dtype=config.model.frozen_dtype, tokens_per_chip=tokens // layout.mesh.size,
        trained=layout.plan.count(True), frozen=layout.plan.count(False), hbm=program.hbm, hbm_capacity=chip.hbm,
        flops_per_step=cost.flops, collectives=tuple(map(dataclasses.asdict, cost.collectives)),
        dearest=tuple((name, cycles / chip.clock) for name, cycles in program.module.dearest(8)),
        seconds={"fusions": cost.cycles, "Pallas kernels": cost.kernels, "blocking collectives": cost.blocking,
                 "overlapped collectives": cost.overlapped, "bound: compute": cost.compute_bound,
                 "bound: HBM": cost.memory_bound, "bound: interconnect": cost.interconnect_bound},
        step_seconds=cost.step, mfu=cost.mfu, tokens_per_second=tokens / cost.step,
        images_per_second=config.batch_size / cost.step, steps=config.steps,
        chip_hours=config.steps * cost.step * layout.mesh.size / 3600, compile_seconds=program.seconds)

  def lines(self) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
    used = sum(self.hbm.values())
    return [
        f"stage {self.stage} on {self.topology}, {self.chips} chips: {mesh}; batch {self.batch_size} in {self.accumulate_steps} "
        f"microbatches, {self.tokens_per_chip:,} tokens per chip; remat {self.remat}, frozen in {self.frozen_dtype}",
        f"parameters             {self.trained:,} trained, {self.frozen:,} frozen",
        f"HBM per chip           {used / GIB:.2f} of {self.hbm_capacity / GIB:.0f} GiB",
        *(f"  {kind:28}{size / GIB:8.2f} GiB" for kind, size in self.hbm.items()),
        f"FLOPs per step         {self.flops_per_step:.4g} (the model's; what remat repeats is not counted)",
        "collectives per step   kind, mesh axis, runs, arrays' bytes, seconds",
        *(f"  {c['kind']:20}{c['axis']:16}{c['runs']:8}{c['bytes'] / GIB:10.2f} GiB{c['seconds'] * 1e3:10.1f} ms"
          + (" overlapped" if c["overlapped"] else "") for c in self.collectives),
        "time per step",
        *(f"  {part:28}{seconds * 1e3:10.1f} ms" for part, seconds in self.seconds.items()),
        "dearest operations",
        *(f"  {seconds * 1e3:10.1f} ms  {name}" for name, seconds in self.dearest),
        f"predicted              {self.step_seconds:.3f} s per step, MFU {self.mfu:.1%}, {self.tokens_per_second:,.0f} tokens/s, "
        f"{self.images_per_second:,.0f} images/s",
        f"the schedule           {self.steps:,} steps: {self.steps * self.step_seconds / 86400:.1f} days, {self.chip_hours:,.0f} chip-hours",
    ]

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)


def text_length(config) -> int:
  """Text positions of one example, padding included: the LLM's in stage 2, spatial representation and caption in stage 1."""
  data = config.data
  return data.llm_length if config.stage == "instruct" else data.spatial_length + data.caption_length
