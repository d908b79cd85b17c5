"""What is known of the source when shards are finished: whether pictures were edited since, and what was left out."""

import collections
from collections.abc import Sequence

from refiner_export.common.settings import require
from refiner_export.export.plan import ExportPlan
from refiner_export.export.reading import PictureVersions
from refiner_export.export.reports import Report
from refiner_export.export.shard import read_report
from refiner_export.records.record import RecordError
from refiner_export.records.shard_files import ShardInfo


def check_pictures(plan: ExportPlan, numbers: Sequence[int]) -> None:
  """Compares sizes and time stamps, or whatever the source states as a version; no picture is read.

  A shard is left alone when one of its pictures is not there any more: nothing says that the picture was edited.

  Raises:
    UserError: names the shard.
  """
  for number in numbers:
    try:
      report = read_report(plan, number)
    except RecordError:  # it will be made again
      continue
    if report is None or not report.shard.pictures_version:
      continue
    require(_versions(plan, number, report) in (None, report.shard.pictures_version),
            f"{plan.directory}: pictures of {plan.path(number).name} were edited since it was made: restore them, or "
            "remove the directory")


def dropped_by_reason(shards: Sequence[ShardInfo], plan: ExportPlan) -> dict[str, int]:
  """How many texts and annotations were left out of all shards, or belong to no example at all."""
  total = collections.Counter()
  for shard in shards:
    total.update(shard.dropped)
  for unit in plan.units:
    total.update(plan.config.source.unmatched(unit))
  return dict(sorted(total.items()))


def _versions(plan: ExportPlan, number: int, report: Report) -> str | None:
  """What a shard would be made of now; None when a picture is not there."""
  part, versions = plan.slice_of(number), PictureVersions()
  skipped = {error["id"] for error in report.skipped}
  for id, stated in plan.config.source.picture_versions(part.unit, part.start, part.stop):
    if id in skipped:
      continue
    if "" in stated:
      return None
    versions.add(stated)
  return versions.text
