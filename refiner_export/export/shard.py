"""The unit of work: one output shard, decided by the configuration and its number alone. Every runner calls this.

A shard is finished when its report lies beside it. The report says what is in the shard, and which examples were
skipped and why. It is written last, and it is kept until the manifest says the same.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator

from etils import epath

from refiner_export.common import images
from refiner_export.common.files import reason, write_atomically
from refiner_export.common.images import UnreadableImage
from refiner_export.common.out_of_memory import as_one_line
from refiner_export.common.settings import require
from refiner_export.common.stores import store_errors
from refiner_export.export import pipeline
from refiner_export.export.config import ExportConfig
from refiner_export.export.fetching import UnreadLimit
from refiner_export.export.plan import ExportPlan, read_plan
from refiner_export.export.prefetch import prefetch
from refiner_export.export.reading import ShardExamples
from refiner_export.export.reports import Report, kept_reports, skip_of
from refiner_export.records.formats import open_described, write_shard
from refiner_export.records.record import RecordError
from refiner_export.records.shard_files import ShardInfo, ShardItem
from refiner_export.refiners.base import Refiner, RefinerSettings

_ONE_AT_A_TIME = threading.Lock()

Advance = Callable[[int, int], None]  # how many examples were just done, and how many of them were skipped


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
  with _ONE_AT_A_TIME, store_errors(config.output):
    plan = read_plan(config)
    try:
      report = read_report(plan, number)
    except RecordError as error:
      print(f"writing a shard again: {error}", flush=True)
      report = None
    if report and not report.has_unread:
      return report.shard
    images.DECODING.size = config.runner.reading.megabytes << 20
    with as_one_line(f"shard {number}"):
      return _write(plan, number, _build(config.refiner), advance)


def is_finished(plan: ExportPlan, number: int, retry: bool = False) -> bool:
  """Whether nothing is left to do. With `retry`, examples whose pictures could not be read are left to do."""
  try:
    report = read_report(plan, number)
  except RecordError:
    return False
  return report is not None and not (retry and report.has_unread)


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
    return Report.from_line(path.read_bytes())
  except FileNotFoundError:
    # The export was complete once, perhaps since a moment ago and by another process.
    return kept_reports(plan.directory).get(plan.path(number).name)
  except (ValueError, TypeError) as error:
    raise RecordError(f"{path}: not a report of a shard ({reason(error)})") from None


def _compare(report: Report, plan: ExportPlan, number: int) -> None:
  path, shard = plan.path(number), report.shard
  if report.damage:
    raise RecordError(f"{path}: {report.damage}")
  if shard.file != path.name:
    raise RecordError(f"{path}: its report is that of {shard.file}")
  if shard.made_of not in ("", plan.made_of(number)):
    raise RecordError(f"{path}: it was made with other settings, or of another part of the source")
  open_described(plan.directory, shard)
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
  shard = dataclasses.replace(
      shard, skipped=len(skipped), texts=examples.texts, dropped=examples.counted(), made_of=plan.made_of(number),
      pictures_version=examples.pictures_version)
  write_atomically(report_path(plan, number), Report(shard, tuple(skipped)).to_line())
  return shard


def _items(
    plan: ExportPlan, number: int, examples: ShardExamples, refiner: Refiner, skipped: list[dict[str, str]],
    advance: Advance,
) -> Iterator[ShardItem]:
  """The records of a shard, serialised. Appends to `skipped` what has no record.

  The source is compared with an earlier report at the end, while the file still has its unfinished name.
  """
  config = plan.config
  read = functools.partial(pipeline.read, image=config.image, reading=config.runner.reading)
  limit = UnreadLimit(config.runner.reading.unread, plan.slice_of(number).count)
  ready = prefetch(read, examples.batches(config.batch), config.runner.threads, config.runner.prefetch)
  with contextlib.closing(ready):
    for batch, found in ready:
      before = len(skipped)
      for stored in found:
        examples.add_versions(stored)
      for result in pipeline.refine_read(batch, found, refiner, config.source.name):
        is_skipped = isinstance(result, UnreadableImage)
        limit.add(result if is_skipped else None)
        if is_skipped:
          skipped.append(skip_of(result))
        else:
          yield plan.schema.item(result)
      advance(len(batch), len(skipped) - before)
  limit.end()
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
  is_same_part = report is not None and report.shard.made_of in ("", plan.made_of(number))
  return report.shard.texts if is_same_part else ""
