"""The unit of work: one output shard, decided by the configuration and its number alone. Every runner calls this.

A shard is finished when its report lies beside it. The report says what is in the shard, and which examples were
skipped and why. It is written last, and it is kept until the manifest says the same.
"""

import contextlib
import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterator

from etils import epath

from refiner_export.common.files import write_atomically
from refiner_export.common.images import UnreadableImage
from refiner_export.common.settings import require
from refiner_export.export import pipeline
from refiner_export.export.config import ExportConfig
from refiner_export.export.plan import ExportPlan, read_plan
from refiner_export.export.prefetch import prefetch
from refiner_export.export.reading import ShardExamples
from refiner_export.records.formats import open_shard, write_shard
from refiner_export.records.manifest import MANIFEST, Manifest
from refiner_export.records.record import RecordError
from refiner_export.records.shard_files import ShardInfo, ShardItem
from refiner_export.refiners.base import Refiner, RefinerSettings

ERRORS = "errors.jsonl"

_ONE_AT_A_TIME = threading.Lock()

Advance = Callable[[int, int], None]  # how many examples were just done, and how many of them were skipped


@dataclasses.dataclass(frozen=True)
class Report:
  """A finished shard, and the examples that are missing from it: `id` and `reason` of each, in their order."""
  shard: ShardInfo
  skipped: tuple[dict[str, str], ...]


def _ignore(examples: int, skipped: int) -> None:
  """The `Advance` of who wants no news."""


def export_shard(config: ExportConfig, number: int, advance: Advance = _ignore) -> ShardInfo:
  """Makes shard `number`, 0 <= number < shards of the plan, unless it is finished, and says what is in it.

  The bytes are the same in every process, on every machine and after every crash. Two processes that make the same
  shard at once do twice the work and no harm. A process makes its plan and loads its refiner once; its threads take
  turns.

  Raises:
    UserError: see `read_plan` and `ShardExamples`; or the refiner's files do not fit; or the source gives other texts
      or annotations for a shard than when the shard was first written.
  """
  with _ONE_AT_A_TIME:
    plan = read_plan(config)
    try:
      report = read_report(plan, number)
    except RecordError as error:
      print(f"writing a shard again: {error}", flush=True)
      report = None
    return report.shard if report else _write(plan, number, _build(config.refiner), advance)


def is_finished(plan: ExportPlan, number: int) -> bool:
  try:
    return read_report(plan, number) is not None
  except RecordError:
    return False


def read_report(plan: ExportPlan, number: int) -> Report | None:
  """The report of a shard, compared with the files that it describes; None when there is no report.

  Names, sizes and counts are compared. The bytes are not read, because that takes long where there are terabytes.

  Raises:
    RecordError: a file is missing or has another size, or the shard does not hold everything that was planned for it.
  """
  report = _load_report(plan, number)
  if report is not None:
    _compare(report, plan, number)
  return report


def report_path(plan: ExportPlan, number: int) -> epath.Path:
  return plan.directory / f".report.{plan.path(number).name}.json"


def _load_report(plan: ExportPlan, number: int) -> Report | None:
  path = report_path(plan, number)
  try:
    fields = json.loads(path.read_text())
    return Report(ShardInfo(**fields["shard"]), tuple(fields["skipped"]))
  except FileNotFoundError:
    return _report_from_manifest(plan, number)
  except (ValueError, TypeError, KeyError) as error:
    raise RecordError(f"{path}: not a report of a shard ({' '.join(str(error).split())})") from None


def _report_from_manifest(plan: ExportPlan, number: int) -> Report | None:
  """The report of an export that was complete once, perhaps since a moment ago and by another process."""
  path = plan.directory / MANIFEST
  try:
    stat = path.stat()
  except FileNotFoundError:
    return None
  reports = _reports_of_complete_export(str(plan.directory), stat.length, stat.mtime)
  return reports.get(plan.path(number).name)


# Cached, because a large export asks for many shards. A manifest that was written again has another size or time.
@functools.lru_cache(maxsize=1)
def _reports_of_complete_export(directory: str, length: int, mtime: float) -> dict[str, Report]:
  """File name of a shard -> its report."""
  errors = [json.loads(line) for line in (epath.Path(directory) / ERRORS).read_text().splitlines()]
  reports, start = {}, 0
  for shard in Manifest.load(directory).shards:
    # The lines of the file are in the order of the shards.
    reports[shard.file] = Report(shard, tuple(errors[start:start + shard.skipped]))
    start += shard.skipped
  return reports


def _compare(report: Report, plan: ExportPlan, number: int) -> None:
  path, shard = plan.path(number), report.shard
  found = open_shard(path)
  if (shard.file, shard.records, shard.bytes) != (path.name, len(found), found.bytes):
    raise RecordError(f"{path}: {len(found)} records in {found.bytes} bytes, its report says {shard.records} in "
                      f"{shard.bytes} in {shard.file}")
  skipped, planned = len(report.skipped), plan.slice_of(number).count
  if planned is None:
    planned = shard.records + shard.skipped
  if shard.records + skipped != planned:
    raise RecordError(f"{path}: {shard.records} records and {skipped} skipped examples, {planned} planned")


@functools.lru_cache(maxsize=1)
def _build(settings: RefinerSettings) -> Refiner:
  return settings.build()


def _write(plan: ExportPlan, number: int, refiner: Refiner, advance: Advance) -> ShardInfo:
  examples, skipped = ShardExamples(plan, number), []
  with contextlib.closing(_items(plan, number, examples, refiner, skipped, advance)) as items:
    shard = write_shard(plan.path(number), items)
  shard = dataclasses.replace(shard, skipped=len(skipped), texts=examples.texts)
  report = {"shard": dataclasses.asdict(shard), "skipped": skipped}
  write_atomically(report_path(plan, number), (json.dumps(report, indent=2) + "\n").encode())
  return shard


def _items(
    plan: ExportPlan, number: int, examples: ShardExamples, refiner: Refiner, skipped: list[dict[str, str]],
    advance: Advance,
) -> Iterator[ShardItem]:
  """The records of a shard, serialised. Appends to `skipped` what has no record.

  The source is compared with an earlier report at the end, while the file still has its unfinished name.
  """
  config = plan.config
  read = functools.partial(pipeline.read, image=config.image)
  ready = prefetch(read, examples.batches(config.batch), config.runner.threads, config.runner.prefetch)
  with contextlib.closing(ready):
    for batch, found in ready:
      before = len(skipped)
      for result in pipeline.refine_read(batch, found, refiner, config.source.name):
        if isinstance(result, UnreadableImage):
          skipped.append({"id": result.id, "reason": result.reason})
        else:
          yield plan.schema.item(result)
      advance(len(batch), len(skipped) - before)
  earlier = _earlier_texts(plan, number)
  require(earlier in ("", examples.texts),
          f"{plan.directory}: the source's texts or annotations of {plan.path(number).name} are not those of before "
          f"({examples.texts}, not {earlier}): restore the source, or remove the directory")


def _earlier_texts(plan: ExportPlan, number: int) -> str:
  """The hash in the report of a shard that is written again; "" when there is none."""
  try:
    report = _load_report(plan, number)
  except RecordError:
    return ""
  return report.shard.texts if report else ""
