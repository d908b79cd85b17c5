"""An export from start to end: plan the shards, have those made that are missing, then write the manifest.

A directory shows its state: a shard beside its report is finished, `manifest.json` means that everything is. An export
that was stopped goes on where it stopped and ends with the same bytes as one that was not.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from refiner_export.export.config import ExportConfig
from refiner_export.records.formats import open_shard
from refiner_export.records.manifest import MANIFEST, SPLIT, Manifest, write_tfds_metadata
from refiner_export.export.plan import Plan, read_plan
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import SCHEMA_VERSION, RecordError
from refiner_export.common.settings import require
from refiner_export.export.shard import ERRORS, Report, is_finished, read_report, report_path
from refiner_export.common.files import write_atomically
from refiner_export.common.unfinished import remove_abandoned
from refiner_export.export.workers import run_locally

Runner = Callable[[Plan, Sequence[int]], None]  # has `export_shard` called for each of these numbers, anywhere

_READERS = 16  # threads that ask a remote directory about its shards


@dataclasses.dataclass(frozen=True)
class ShardRange:
  """Shards `start` to `stop`, exclusive, of however many there are: what one of several machines is to make."""
  start: int = 0
  stop: int | None = None

  @classmethod
  def parse(cls, text: str) -> "ShardRange":
    """Reads `10:20`, `10:` or `:20`. Raises `UserError`."""
    start, colon, stop = text.partition(":")
    digits = all(number == "" or number.isdecimal() for number in (start, stop))
    require(bool(colon) and digits, f"--shard-range: expected START:STOP such as 10:20, got {text!r}")
    found = cls(int(start or 0), int(stop) if stop else None)
    require(found.stop is None or found.start < found.stop, f"--shard-range={text}: there is no shard in it")
    return found

  def of(self, shards: int) -> range:
    """The numbers among so many shards. Raises `UserError` when there are none."""
    require(self.start < shards, f"--shard-range: begins at shard {self.start}, the last of {shards} is {shards - 1}")
    return range(self.start, shards if self.stop is None else min(self.stop, shards))


def export(
    config: ExportConfig, shard_range: ShardRange = ShardRange(), runner: Runner = run_locally,
) -> Manifest | None:
  """Makes shards of the directory `config.output`, and the directory complete once all of them are finished.

  Returns:
    The manifest, or None while shards outside the range are missing.

  Raises:
    UserError: see `read_plan` and the runner; or no picture of the source could be read.
  """
  read_plan.cache_clear()  # this process may have read the source before, and it may have been edited since
  plan = read_plan(config)
  numbers = shard_range.of(plan.shards)
  remove_abandoned(plan.directory)
  if _is_complete(plan.directory):
    print(f"{plan.directory} is complete already", flush=True)
    return _end(plan, Manifest.load(plan.directory))
  missing = _missing(plan, numbers)
  if len(missing) < len(numbers):
    print(f"{len(numbers) - len(missing)} of {len(numbers)} shards are finished already", flush=True)
  if missing:
    runner(plan, missing)
  elsewhere = _missing(plan, range(plan.shards)) if len(numbers) < plan.shards else []
  if elsewhere:
    print(f"shards {numbers.start} to {numbers.stop - 1} of {plan.directory} are finished; "
          f"{len(elsewhere)} of {plan.shards} are still to be made", flush=True)
    return None
  return finalise(plan)


def finalise(plan: Plan) -> Manifest:
  """Writes what stands for the whole directory, the manifest last. Raises `UserError` for a shard not as planned."""
  with ThreadPoolExecutor(_READERS) as pool:
    reports = list(pool.map(lambda number: read_report(plan, number), range(plan.shards)))
  unfinished = [number for number, report in enumerate(reports) if report is None]
  require(not unfinished, f"{plan.directory}: shard {unfinished[:1]} is not finished: run the same command again")
  shards, skipped = [report.shard for report in reports], [error for report in reports for error in report.skipped]
  require(len(skipped) < len(plan.examples),
          f"no picture could be read; the first: {json.dumps(skipped[0]) if skipped else ''}")
  manifest = Manifest(
      schema_version=SCHEMA_VERSION, fingerprint=plan.schema.fingerprint, feature_dtype=plan.schema.feature_dtype,
      detection_rows=_detection_rows(plan, reports), refiner=plan.described, source=plan.config.source.name,
      split=SPLIT, shards=tuple(shards), records=sum(shard.records for shard in shards),
      conversations=sum(shard.conversations for shard in shards), skipped=len(skipped),
      format=plan.config.format, optional_fields=plan.schema.optional_fields)
  write_atomically(plan.directory / ERRORS, "".join(f"{json.dumps(error)}\n" for error in skipped).encode())
  write_tfds_metadata(plan.directory, manifest)
  manifest.save(plan.directory)
  return _end(plan, manifest)


def _missing(plan: Plan, numbers: Sequence[int]) -> list[int]:
  with ThreadPoolExecutor(_READERS) as pool:
    return [number for number, finished in zip(numbers, pool.map(lambda number: is_finished(plan, number), numbers))
            if not finished]


def _is_complete(directory: epath.Path) -> bool:
  if not (directory / MANIFEST).exists():
    return False
  try:
    RecordDirectory(directory)
  except RecordError:  # a shard was lost or damaged since
    return False
  return True


def _detection_rows(plan: Plan, reports: Sequence[Report]) -> int:
  """As the first record has them: whoever finalises need not load the refiner, which may want a GPU."""
  first = next(number for number, report in enumerate(reports) if report.shard.records)
  return len(plan.schema.decode(open_shard(plan.path(first)).read(0)).detection_features)


def _end(plan: Plan, manifest: Manifest) -> Manifest:
  """Removes what only a restart needs, and says what there is."""
  with ThreadPoolExecutor(_READERS) as pool:
    list(pool.map(lambda number: report_path(plan, number).unlink(missing_ok=True), range(plan.shards)))
  remove_abandoned(plan.directory)
  storage = manifest.storage
  print(f"{plan.directory}: {manifest.records} records, {manifest.skipped} skipped, {manifest.conversations} "
        f"conversations, {storage.bytes_per_record:,.0f} bytes per record, of it {storage.feature_bytes_per_record:,.0f} "
        f"features (relative error {storage.feature_relative_rmse:.2g}), refiner {manifest.fingerprint}", flush=True)
  if manifest.skipped:
    print(f"why pictures were skipped: {plan.directory / ERRORS}", flush=True)
  return manifest
