"""What a run will need and how fast it will be, without a TPU: its train step is compiled ahead of time for a slice.

Prints parameters, HBM per chip, collectives, predicted time per step and chip-hours, and writes `plan.json` and
`plan.png` to --output. With --search it tries other meshes, remat policies and microbatches, and writes `search.json`.
Exit code 1: the step does not fit, and the last line says what makes it fit.
"""

import json
import sys

from etils import epath

from lyrics_jax.config import Config
from lyrics_jax.planning import search as variants
from lyrics_jax.planning.compile import GIB, DoesNotFit, Layout, compile_step
from lyrics_jax.planning.cost import cost_of
from lyrics_jax.planning.report import Report
from lyrics_jax.planning.topology import Target
from refiner_export.common.command import Command, Flag
from refiner_export.common.files import write_atomically


def plan(config: Config, topology: str, output: str) -> None:
  """One configuration on one slice. Raises `UserError`; exits with 1 where the step does not fit."""
  target = Target.of(topology, config.mesh.slices)
  layout = Layout.of(config, target)
  _tell(f"compiling a step of {config.output} for {topology}: one to eight minutes on two cores")
  try:
    if layout.least_bytes > target.chip.hbm:
      raise DoesNotFit(layout.least_bytes, target.chip.hbm)
    program = compile_step(layout)
  except DoesNotFit as error:
    found = variants.remedy(config, target, _tell)
    advice = ("Neither remat, more fsdp, more accumulate_steps nor int8 makes it fit: use more chips" if found is None
              else f"It fits with {found.flags}")
    _tell(f"does not fit: {error}. {advice}")
    sys.exit(1)
  report = Report.of(program, cost_of(program))
  _write(output, "plan.json", _json(report.to_dict()))
  _write(output, "plan.png", report.picture())
  print("\n".join(report.lines()), flush=True)


def rank(config: Config, topology: str, output: str, most: int) -> None:
  """Variants of one configuration on one slice, the fastest first. Raises `UserError`; exits with 1 where none
  fits."""
  target = Target.of(topology, config.mesh.slices)
  outcomes = variants.search(config, target, most, _tell)
  if not outcomes:
    _tell(f"does not fit: no variant fits {topology}; use more chips, or --config.compute.frozen_dtype=int8")
    sys.exit(1)
  ranking = []
  for outcome in outcomes:
    report = outcome.report
    ranking.append(outcome.changes | report.to_dict())
    print(f"{report.step_seconds:8.3f} s  MFU {report.mfu:6.1%}  {report.hbm_used / GIB:7.2f} GiB  {outcome.flags}",
          flush=True)
  _write(output, "search.json", _json(ranking))
  _write(output, "plan.png", outcomes[0].report.picture())


def _json(value) -> bytes:
  return json.dumps(value, indent=2).encode()


def _write(output: str, name: str, contents: bytes) -> None:
  folder = epath.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  write_atomically(folder / name, contents)


def _tell(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def main(config: Config, topology: str, output: str | None, search: bool, most: int) -> None:
  output = output or f"{config.output}/plan"
  if search:
    rank(config, topology, output, most)
  else:
    plan(config, topology, output)


COMMAND = Command(
    name="lyrics_jax.plan", about=__doc__, main=main, config=Config,
    flags=(
        Flag("topology", "TPU slice to compile for, such as v5p:4x4x4 or v5e:4x4", metavar="CHIP:SHAPE", required=True),
        Flag("output", "directory of plan.json and plan.png; by default plan/ in the run's directory", metavar="DIR"),
        Flag("search", "try mesh shapes, remat policies and microbatches, and rank what fits", default=False),
        Flag("most", "compilations of a search, of one to eight minutes each on two cores", default=12, at_least=1)),
    examples=(
        "python -m lyrics_jax.plan --config configs/instruct_vicuna13b.py --topology v5p:4x4x4 --config.mesh.fsdp=16",
        "python -m lyrics_jax.plan --config configs/instruct_vicuna13b.py --topology v5p:4x4x4 --search --most 8"))

if __name__ == "__main__":
  COMMAND.run()
