"""What a run will need and how fast it will be, without a TPU: its train step is compiled ahead of time for a slice.

  python -m lyrics_jax.plan --config configs/instruct_vicuna13b.py --topology v5p:4x4x4 [--config.mesh.fsdp=16] [--search]

Prints parameters, HBM per chip, collectives, predicted time per step and chip-hours; writes `plan.json` and `plan.png` (with
--search `search.json`) to --output. Exit code 1: the step does not fit, and what would make it fit; 2: something to mend.
"""

import json
import sys

from absl import flags
from etils import epath

from lyrics_jax import logs
from lyrics_jax.config import Config
from lyrics_jax.planning import picture, search
from lyrics_jax.planning.compile import DoesNotFit, Layout, compile_step
from lyrics_jax.planning.cost import cost_of
from lyrics_jax.planning.report import Report
from lyrics_jax.planning.topology import Target
from refiner_export.common import settings
from refiner_export.common.settings import require
from refiner_export.common.files import write_atomically


def plan(config: Config, topology: str, output: str) -> None:
  """One configuration on one slice. Raises `UserError`; exits with 1 where the step does not fit."""
  target = Target.of(topology, config.mesh.slices)
  layout = Layout.of(config, target)
  _tell(f"compiling stage {config.stage} for {topology}: one to eight minutes on two cores")
  try:
    if layout.least_bytes > target.chip.hbm:
      raise DoesNotFit(layout.least_bytes, target.chip.hbm)
    program = compile_step(layout)
  except DoesNotFit as error:
    found = search.remedy(config, target, _tell)
    print(f"does not fit: {error}. " + ("Neither remat, more fsdp, more accumulate_steps nor int8 makes it fit: use more chips" if found is None
                                        else f"It fits with {found.flags}"), file=sys.stderr, flush=True)
    sys.exit(1)
  report = Report.of(program, cost_of(program))
  _write(output, "plan.json", json.dumps(report.to_dict(), indent=2).encode())
  _write(output, "plan.png", picture.draw(report))
  print("\n".join(report.lines()), flush=True)


def rank(config: Config, topology: str, output: str, most: int) -> None:
  """Variants of one configuration on one slice, the fastest first. Raises `UserError`; exits with 1 where none fits."""
  target = Target.of(topology, config.mesh.slices)
  outcomes = search.search(config, target, most, _tell)
  if not outcomes:
    print(f"does not fit: no variant fits {topology}; use more chips, or --config.model.frozen_dtype=int8", file=sys.stderr, flush=True)
    sys.exit(1)
  _write(output, "search.json", json.dumps([o.changes | o.report.to_dict() for o in outcomes], indent=2).encode())
  _write(output, "plan.png", picture.draw(outcomes[0].report))
  for outcome in outcomes:
    report = outcome.report
    print(f"{report.step_seconds:8.3f} s  MFU {report.mfu:6.1%}  {sum(report.hbm.values()) / 2**30:7.2f} GiB  {outcome.flags}", flush=True)


def _write(output: str, name: str, contents: bytes) -> None:
  folder = epath.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  write_atomically(folder / name, contents)


def _tell(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def main() -> None:
  require(bool(flags.FLAGS.topology), "--topology is required: the slice to compile for, for example v5p:4x4x4")
  output = flags.FLAGS.output or f"{CONFIG.value.output}/plan"
  if flags.FLAGS.search:
    rank(CONFIG.value, flags.FLAGS.topology, output, flags.FLAGS.most)
  else:
    plan(CONFIG.value, flags.FLAGS.topology, output)


if __name__ == "__main__":
  logs.setup()
  CONFIG = settings.define(Config)
  flags.DEFINE_string("topology", None, "TPU slice, for example v5p:4x4x4 or v5e:4x4")
  flags.DEFINE_string("output", None, "directory of plan.json and plan.png; by default plan/ in the run's own")
  flags.DEFINE_bool("search", False, "try mesh shapes, remat policies and microbatches, and rank what fits")
  flags.DEFINE_integer("most", 12, "compilations of a search, each of one to eight minutes on two cores", lower_bound=1)
  settings.run(main, CONFIG)
