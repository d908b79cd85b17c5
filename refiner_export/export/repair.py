"""Checks every byte of an exported directory, and makes again just what is damaged.

The configuration of the export names the directory. Whole shards are kept; the others and the files beside the shards
are written again. The result has the bytes of an export that was never damaged. An unfinished export is finished.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

from refiner_export.common.command import Command, Flag
from refiner_export.common.files import hash_file, reason, write_atomically
from refiner_export.common.progress import Progress
from refiner_export.common.stores import store_errors
from refiner_export.export.config import ExportConfig
from refiner_export.export.plan import ExportPlan, clear_plans, read_plan
from refiner_export.export.reports import Report, kept_reports, write_reports
from refiner_export.export.run import export
from refiner_export.export.shard import read_report, report_path
from refiner_export.records.manifest import MANIFEST, Manifest
from refiner_export.records.record import RecordError


def repair(config: ExportConfig, threads: int = 4) -> Manifest:
  """Mends the directory `config.output`. Raises `UserError` as `export` does."""
  with store_errors(config.output):
    _mark_damaged(config, threads)
  return export(config)


def _mark_damaged(config: ExportConfig, threads: int) -> None:
  clear_plans()
  plan = read_plan(config)
  damaged = _damaged(plan, threads)
  if damaged:
    kept = kept_reports(plan.directory)
    if kept:  # what only the manifest knows must outlast it
      write_reports(plan.directory, list(kept.values()))
    for number, report in damaged.items():
      print(f"{plan.path(number)}: {report.damage}", flush=True)
      write_atomically(report_path(plan, number), report.to_line())
    # A directory with a manifest counts as complete, so the manifest goes after the damage is noted.
    (plan.directory / MANIFEST).unlink(missing_ok=True)


def _damaged(plan: ExportPlan, threads: int) -> dict[int, Report]:
  """The shards whose files have other bytes than their reports say. What opening notices is left to the export."""
  def look(number: int) -> Report | None:
    try:
      report = read_report(plan, number)
      if report is None or hash_file(plan.path(number)) == report.shard.sha256:
        return None
      damage = "its checksum is not that of its report"
    except RecordError:
      return None
    except OSError as error:
      damage = f"cannot be read ({reason(error)})"
    return dataclasses.replace(report, damage=damage)

  damaged = {}
  with Progress(plan.shards, unit="shard") as progress, ThreadPoolExecutor(threads) as pool:
    for number, report in enumerate(pool.map(look, range(plan.shards))):
      if report is not None:
        damaged[number] = report
      progress.add(1)
  return damaged


def main(config: ExportConfig, threads: int) -> None:
  repair(config, threads)


COMMAND = Command(
    name="refiner_export repair",
    about=__doc__,
    main=main,
    config=ExportConfig,
    flags=(Flag("threads", "threads that read shards", default=os.cpu_count() or 1, at_least=1),),
    examples=("python -m refiner_export repair --config configs/export_quickstart.py --config.output=DIR",),
)

if __name__ == "__main__":
  COMMAND.run()
