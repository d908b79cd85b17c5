"""Plans of the published runs on several TPU slices, as a table: python -m benchmarks.plan_table [--rows=0,2]

Compiles each plan ahead of time, which needs libtpu and no TPU. Writes docs/plan_table.md, and prints the figures as
one JSON object on its last line. A row that does not fit says by how much.
"""

import argparse
import json
import pathlib
import sys

from configs import align_vit_l, instruct_vicuna7b, instruct_vicuna13b
from lyrics_jax.config import Config
from lyrics_jax.planning.compile import GIB, DoesNotFit, Layout, compile_step
from lyrics_jax.planning.cost import cost_of
from lyrics_jax.planning.report import Report
from lyrics_jax.planning.search import Changes, changed
from lyrics_jax.planning.topology import Target

ROWS = (  # what, configuration, slice, changes
    ("stage 2, Vicuna-13B bf16", instruct_vicuna13b, "v5e:4x4", {}),
    ("stage 2, Vicuna-13B bf16", instruct_vicuna13b, "v5p:4x4x4", {}),
    ("stage 2, Vicuna-13B bf16", instruct_vicuna13b, "v5p:4x4x4", {"mesh.fsdp": 1}),
    ("stage 2, Vicuna-7B int8", instruct_vicuna7b, "v5e:1x1",
     {"mesh.fsdp": 1, "compute.remat": "dots", "compute.frozen_dtype": "int8", "optimizer.accumulate_steps": 64}),
    ("stage 1, batch 512", align_vit_l, "v5e:4x4", {}),
    # 16 rows of 512 tokens on each chip of three slices
    ("stage 2, Vicuna-13B bf16, batch 1024", instruct_vicuna13b, "v5p:4x4x4", {"batch_size": 1024}),
    ("stage 2, Vicuna-13B bf16, batch 256", instruct_vicuna13b, "v5p:2x2x4", {"batch_size": 256}),
    ("stage 2, Vicuna-13B bf16, batch 4096", instruct_vicuna13b, "v5p:4x8x8", {"batch_size": 4096}),
)
HEADER = ("run", "slice", "mesh", "microbatches", "tokens per chip", "HBM per chip", "time per step", "MFU",
          "chip-hours", "compiled in")
TITLE = """# Plans of the published runs

Predicted by `python -m benchmarks.plan_table`, not measured; `docs/plan.md` says what the figures can and cannot tell.

"""


def plan(config: Config, topology: str, changes: Changes) -> Report | DoesNotFit:
  config = changed(config, changes)
  layout = Layout.of(config, Target.of(topology, config.mesh.slices))
  try:
    program = compile_step(layout)
  except DoesNotFit as error:
    return error
  return Report.of(program, cost_of(program))


def cells(name: str, topology: str, outcome: Report | DoesNotFit) -> list[str]:
  if isinstance(outcome, DoesNotFit):
    verdict = f"does not fit: {outcome.used / GIB:.1f} of {outcome.capacity / GIB:.1f} GiB"
    return [name, topology, "", "", "", verdict, "", "", "", ""]
  mesh = " x ".join(f"{axis} {size}" for axis, size in outcome.mesh.items() if size > 1)
  return [name, topology, mesh or "one chip", str(outcome.accumulate_steps), f"{outcome.tokens_per_chip:,}",
          f"{outcome.hbm_used / GIB:.1f} of {outcome.hbm_capacity / GIB:.0f} GiB", f"{outcome.step_seconds:.3f} s",
          f"{outcome.mfu:.1%}", f"{outcome.chip_hours:,.0f}", f"{outcome.compile_seconds:.0f} s"]


def figures_of(name: str, topology: str, outcome: Report | DoesNotFit) -> dict:
  run = {"run": name, "topology": topology}
  if isinstance(outcome, DoesNotFit):
    return run | {"does_not_fit": str(outcome)}
  return outcome.to_dict() | run


def line(cells: list[str]) -> str:
  return f"| {' | '.join(cells)} |\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", default=",".join(map(str, range(len(ROWS)))), help="numbers of the rows to compile")
  parser.add_argument("--output", default=str(pathlib.Path(__file__).parents[1] / "docs" / "plan_table.md"))
  arguments = parser.parse_args()
  table, figures = TITLE + line(HEADER) + "|---" * len(HEADER) + "|\n", []
  for number in map(int, arguments.rows.split(",")):
    name, module, topology, changes = ROWS[number]
    print(f"{name} on {topology}", file=sys.stderr, flush=True)
    outcome = plan(module.get_config(), topology, changes)
    table += line(cells(name, topology, outcome))
    figures.append(figures_of(name, topology, outcome))
    pathlib.Path(arguments.output).write_text(table)
  print(json.dumps(figures))


if __name__ == "__main__":
  main()
