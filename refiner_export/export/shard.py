"""The unit of work: one output shard, decided by the configuration and its number alone. Every runner calls this.

A shard is finished when its report lies beside it: what is in it, and which pictures were skipped and why. The report
is written last and only kept until the manifest tells the same.
"""

import contextlib
import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterator

from etils import epath

from refiner_export.export import pipeline
from refiner_export.export.config import ExportConfig
from refiner_export.records.features import FeatureSums
from refiner_export.records.formats import open_shard, write_shard
from refiner_export.export.images import UnreadableImage
from refiner_export.records.manifest import MANIFEST, Manifest
from refiner_export.export.plan import Plan, read_plan
from refiner_export.export.prefetch import prefetch
from refiner_export.records.record import RecordError
from refiner_export.refiners.base import Refiner, RefinerSettings
from refiner_export.common.files import write_atomically
from refiner_export.records.shard_files import ShardInfo

ERRORS = "errors.jsonl"

_ONE_AT_A_TIME = threading.Lock()

Advance = Callable[[int, int], None]  # how many pictures were just done, and how many of them skipped


@dataclasses.dataclass(frozen=True)
class Report:
  """A finished shard, and the pictures that are missing from it: `id` and `reason` of each, in their order."""
  shard: ShardInfo
  skipped: tuple[dict[str, str], ...]


def export_shard(config: ExportConfig, number: int, advance: Advance = lambda pictures, skipped: None) -> ShardInfo:
  """Makes shard `number`, 0 <= number < shards of the plan, unless it is finished, and says what is in it.

  The bytes are the same in whichever process, on whichever machine and after whichever crash. Two processes that make
  the same shard at once do twice the work and no harm. The source and the refiner are loaded once in a process;
  threads of one process take turns.

  Raises:
    UserError: see `read_plan`; or the refiner's files do not fit.
  """
  with _ONE_AT_A_TIME:
    plan = read_plan(config)
    try:
      report = read_report(plan, number)
    except RecordError as error:
      print(f"writing a shard again: {error}", flush=True)
      report = None
    return report.shard if report else _write(plan, number, _build(config.refiner), advance)


def is_finished(plan: Plan, number: int) -> bool:
  try:
    return read_report(plan, number) is not None
  except RecordError:
    return False


def read_report(plan: Plan, number: int) -> Report | None:
  """The report of a shard, once its files were found to be those it tells of; None when there is none.

  What is compared are names, sizes and counts: not every byte, which takes long where there are terabytes.

  Raises:
    RecordError: a file is missing or of another size, or the shard does not hold all that was planned for it.
  """
  path = report_path(plan, number)
  try:
    fields = json.loads(path.read_text())
    report = Report(ShardInfo(**fields["shard"]), tuple(fields["skipped"]))
  except FileNotFoundError:
    report = _report_from_manifest(plan, number)
  except (ValueError, TypeError, KeyError) as error:
    raise RecordError(f"{path}: not a report of a shard ({' '.join(str(error).split())})") from None
  if report is not None:
    _compare(report, plan, number)
  return report


def report_path(plan: Plan, number: int) -> epath.Path:
  return plan.directory / f".report.{plan.path(number).name}.json"


def _report_from_manifest(plan: Plan, number: int) -> Report | None:
  """Of an export that was complete once, perhaps since a moment ago and by another process."""
  if not (plan.directory / MANIFEST).exists():
    return None
  shard = next((shard for shard in Manifest.load(plan.directory).shards if shard.file == plan.path(number).name), None)
  if shard is None:
    return None
  planned = {example.id for example in plan.examples_of(number)}
  errors = [json.loads(line) for line in (plan.directory / ERRORS).read_text().splitlines()]
  return Report(shard, tuple(error for error in errors if error["id"] in planned))


def _compare(report: Report, plan: Plan, number: int) -> None:
  path, told = plan.path(number), report.shard
  found = open_shard(path)
  if (told.file, told.records, told.bytes) != (path.name, len(found), found.bytes):
    raise RecordError(f"{path}: {len(found)} records in {found.bytes} bytes, its report tells of {told.records} in "
                      f"{told.bytes} in {told.file}")
  planned = len(plan.examples_of(number))
  if told.records + len(report.skipped) != planned:
    raise RecordError(f"{path}: {told.records} records and {len(report.skipped)} skipped pictures, {planned} planned")


@functools.lru_cache(maxsize=1)
def _build(settings: RefinerSettings) -> Refiner:
  return settings.build()


def _write(plan: Plan, number: int, refiner: Refiner, advance: Advance) -> ShardInfo:
  config, skipped = plan.config, []
  examples = plan.examples_of(number)
  batches = (examples[start:start + config.batch] for start in range(0, len(examples), config.batch))
  read = functools.partial(pipeline.read, image=config.image)

  def records() -> Iterator[tuple[bytes, int, FeatureSums]]:
    with contextlib.closing(prefetch(read, batches, config.runner.threads, config.runner.prefetch)) as ready:
      for batch, found in ready:
        before = len(skipped)
        for result in pipeline.refine_read(batch, found, refiner, config.source.name):
          if isinstance(result, UnreadableImage):
            skipped.append({"id": result.id, "reason": result.reason})
          else:
            yield plan.schema.encode(result), len(result.conversations), plan.schema.measure(result)
        advance(len(batch), len(skipped) - before)

  with contextlib.closing(records()) as encoded:
    shard = write_shard(plan.path(number), encoded)
  report = {"shard": dataclasses.asdict(shard), "skipped": skipped}
  write_atomically(report_path(plan, number), (json.dumps(report, indent=2) + "\n").encode())
  return shard
