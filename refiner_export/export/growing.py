"""An export that grows: a raised `limit`, or units that were added behind those of before. Finished shards are kept.

The name of a shard says how many shards there are. So the files of finished shards get new names, and no byte of them
is written again. Every step can be interrupted and done again: the settings of the directory are written last.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

from refiner_export.common.files import writing
from refiner_export.export.config import ExportConfig
from refiner_export.export.plan import (
    ExportPlan, begun_with, deciding_settings, described_unit, limited_units, make_plan, plan_of, write_settings)
from refiner_export.export.reports import Report, kept_reports, write_reports
from refiner_export.export.shard import report_path
from refiner_export.records.manifest import MANIFEST
from refiner_export.records.shard_files import index_path

_GROWING = ("limit", "source")


def grow(config: ExportConfig) -> None:
  """Makes a directory ready for more shards when it was begun with a part of what the configuration says now.

  Anything else is left to `read_plan`, which refuses it.
  """
  plan = make_plan(config)
  begun = begun_with(plan.directory)
  if begun is None:
    return
  settings = deciding_settings(plan)
  earlier = _earlier_plan(plan, settings, begun)
  if earlier is None:
    return
  print(f"{plan.directory} grows from {earlier.shards} shards to {plan.shards}", flush=True)
  kept = [number for number in range(min(earlier.shards, plan.shards))
          if earlier.made_of(number) == plan.made_of(number)]
  write_reports(plan.directory, list(_moved_reports(earlier, plan, kept)))
  with writing(plan.directory):
    (plan.directory / MANIFEST).unlink(missing_ok=True)
    for number in kept:
      _move(earlier, plan, number)
    for number in sorted({*range(earlier.shards)} - {*kept}):  # the end of the limit of before
      for path in (earlier.path(number), index_path(earlier.path(number)), report_path(earlier, number)):
        path.unlink(missing_ok=True)
  write_settings(plan.directory, settings)


def _earlier_plan(plan: ExportPlan, settings: dict, begun: dict) -> ExportPlan | None:
  """The plan that the directory was begun with; None when it is not the beginning of this plan."""
  if settings == begun or _without_size(settings) != _without_size(begun):
    return None
  limit = begun.get("limit")
  is_whole = plan.config.limit is None or limit is not None and limit <= plan.config.limit
  if not is_whole or not (limit is None or type(limit) is int and limit > 0):
    return None
  units, counts = limited_units(plan.config, limit)
  digest = hashlib.sha256()
  for length, (unit, count) in enumerate(zip(units, counts), 1):
    digest.update(described_unit(unit, count))
    if digest.hexdigest()[:12] == begun["source"].get("units"):
      return plan_of(plan.config, units[:length], counts[:length])
  return None


def _without_size(settings: dict) -> dict | None:
  """All settings but the limit and the hash of the units; None for settings without a source."""
  source = settings.get("source")
  if not isinstance(source, dict):
    return None
  rest = {name: value for name, value in settings.items() if name not in _GROWING}
  return rest | {"source": {name: value for name, value in source.items() if name != "units"}}


def _moved_reports(earlier: ExportPlan, plan: ExportPlan, numbers: list[int]) -> Iterator[Report]:
  """The reports of finished shards under their new names."""
  kept = kept_reports(plan.directory)
  for number in numbers:
    report = kept.get(plan.path(number).name) or kept.get(earlier.path(number).name)
    try:
      report = Report.from_line(report_path(earlier, number).read_bytes())
    except (OSError, ValueError, TypeError):  # there is none beside the shard, or it is damaged
      pass
    if report is not None:
      yield dataclasses.replace(report, shard=dataclasses.replace(report.shard, file=plan.path(number).name))


def _move(earlier: ExportPlan, plan: ExportPlan, number: int) -> None:
  """Gives the files of a shard their new names. Files that an interrupted run has moved are there already."""
  old, new = earlier.path(number), plan.path(number)
  if old == new:
    return
  for before, after in (index_path(old), index_path(new)), (old, new):
    if before.exists():
      before.replace(after)
  report_path(earlier, number).unlink(missing_ok=True)
