"""An export from start to end: plan the shards, have the missing shards made, then write the manifest.

A directory shows its state: a shard beside its report is finished, and with a `manifest.json` everything is finished.
An export that was stopped goes on where it stopped, and it ends with the same bytes as an export that nobody stopped.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from refiner_export.common.files import hash_file, is_local
from refiner_export.common.settings import UserError, require
from refiner_export.common.stores import store_errors
from refiner_export.common.unfinished import remove_abandoned
from refiner_export.export.config import ExportConfig
from refiner_export.export.growing import grow
from refiner_export.export.inputs import check_pictures, dropped_by_reason
from refiner_export.export.plan import CONFIG, ExportPlan, clear_plans, read_plan
from refiner_export.export.reports import REPORTS, Report, kept_reports, write_reports
from refiner_export.export.shard import is_finished, read_report, report_path
from refiner_export.export.workers import run_locally
from refiner_export.records.formats import open_shard
from refiner_export.records.manifest import ERRORS, MANIFEST, SPLIT, TFDS_FILES, Manifest, write_tfds_metadata
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.schema import SCHEMA_VERSION

Runner = Callable[[ExportPlan, Sequence[int]], None]  # has `export_shard` called for each of these numbers, anywhere

_READERS = 16  # threads that ask a remote directory about its shards
_REPORT = re.compile(r"\.report\..+-(\d+)-of-(\d+)\.json")


@dataclasses.dataclass(frozen=True)
class ShardRange:
  """Shards `start` to `stop` (exclusive): what one of several machines makes. None means up to the last shard."""
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
  """Makes shards of the directory `config.output`, and completes the directory once all of them are finished.

  Returns:
    The manifest, or None while shards outside the range are missing.

  Raises:
    UserError: see `read_plan` and the runner; or no picture of the source could be read.
  """
  with store_errors(config.output):
    return _export(config, shard_range, runner)


def _export(config: ExportConfig, shard_range: ShardRange, runner: Runner) -> Manifest | None:
  clear_plans()
  grow(config)
  plan = read_plan(config)
  numbers = shard_range.of(plan.shards)
  remove_abandoned(plan.directory)
  unread = _unread(plan, numbers)
  if not unread and _is_complete(plan.directory):
    check_pictures(plan, numbers)
    print(f"{plan.directory} is complete already", flush=True)
    return _end(plan, Manifest.load(plan.directory))
  missing = _missing(plan, numbers, retry=True)
  if len(missing) < len(numbers):
    check_pictures(plan, sorted({*numbers} - {*missing}))
  if unread:
    print(f"reading again what could not be read in {len(unread)} shards", flush=True)
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


def finalise(plan: ExportPlan) -> Manifest:
  """Writes what stands for the whole directory, the manifest last. Raises `UserError` for a shard not as planned."""
  reports = _read_reports(plan)
  shards, skipped = [], []
  for report in reports:
    shards.append(report.shard)
    skipped += report.skipped
  records = sum(shard.records for shard in shards)
  require(records > 0 or bool(skipped), "config.source: there is no example in it")
  require(records > 0, f"no picture could be read; the first: {json.dumps(skipped[:1])[1:-1]}")
  write_reports(plan.directory, reports)
  manifest = Manifest(
      schema_version=SCHEMA_VERSION, fingerprint=plan.schema.fingerprint, feature_dtype=plan.schema.feature_dtype,
      detection_rows=_detection_rows(plan, reports), refiner=plan.described, source=plan.config.source.name,
      split=SPLIT, shards=tuple(shards), records=records, conversations=sum(shard.conversations for shard in shards),
      pictures=sum(shard.pictures for shard in shards), skipped=len(skipped), format=plan.config.format,
      optional_fields=plan.schema.optional_fields, dropped=dropped_by_reason(shards, plan))
  write_tfds_metadata(plan.directory, manifest)
  files = {name: hash_file(plan.directory / name) for name in (CONFIG, ERRORS, REPORTS, *TFDS_FILES)}
  manifest = dataclasses.replace(manifest, files=files)
  manifest.save(plan.directory)
  return _end(plan, manifest)


def _read_reports(plan: ExportPlan) -> list[Report]:
  def read(number: int) -> Report | None:
    return read_report(plan, number)

  with ThreadPoolExecutor(_READERS) as pool:
    reports = list(pool.map(read, range(plan.shards)))
  if None in reports:
    require(False, f"{plan.directory}: shard {reports.index(None)} is not finished: run the same command again")
  return reports


def _unread(plan: ExportPlan, numbers: Sequence[int]) -> list[int]:
  """The shards of a complete directory that lack examples whose pictures could not be read."""
  kept = kept_reports(plan.directory)
  if not kept:
    return []
  unread = []
  for number in numbers:
    report = kept.get(plan.path(number).name)
    if report and report.has_unread:
      unread.append(number)
  return unread


def _missing(plan: ExportPlan, numbers: Sequence[int], retry: bool = False) -> list[int]:
  """The shards among these that are not finished; with `retry`, also those that lack what could not be read."""
  def is_missing(number: int) -> bool:
    return not is_finished(plan, number, retry)

  reported = _reported(plan)
  missing, candidates = [], []
  for number in numbers:
    (candidates if reported is None or number in reported else missing).append(number)
  with ThreadPoolExecutor(_READERS) as pool:
    for number, unfinished in zip(candidates, pool.map(is_missing, candidates)):
      if unfinished:
        missing.append(number)
  return sorted(missing)


def _reported(plan: ExportPlan) -> set[int] | None:
  """The shards that have a report, by one look at the directory; None when every shard has to be asked.

  A complete directory keeps the reports of all shards in one file. The list of an object store may be older than the
  store.
  """
  kept = (plan.directory / MANIFEST).exists() or (plan.directory / REPORTS).exists()
  if kept or not is_local(plan.directory):
    return None
  reported = set()
  for path in plan.directory.iterdir():
    found = _REPORT.fullmatch(path.name)
    if found and int(found[2]) == plan.shards:
      reported.add(int(found[1]))
  return reported


def _is_complete(directory: epath.Path) -> bool:
  if not (directory / MANIFEST).exists():
    return False
  try:
    RecordDirectory(directory)
  except UserError as error:  # a file was lost or damaged since
    print(f"going on, because the directory is damaged: {error}", flush=True)
    return False
  return True


def _detection_rows(plan: ExportPlan, reports: Sequence[Report]) -> int:
  """How many detector rows a picture has, read from the first picture; 0 when there is no picture.

  The refiner would know too, but loading it may take a GPU, which the process that comes last need not have.
  """
  for number, report in enumerate(reports):
    if report.shard.pictures:
      shard = open_shard(plan.path(number))
      first = int(np.flatnonzero(shard.picture_counts)[0])
      return len(plan.schema.decode(shard.read(first)).pictures[0].detection_features)
  return 0


def _end(plan: ExportPlan, manifest: Manifest) -> Manifest:
  """Removes what only a restart needs, and says what there is."""
  def remove_report(number: int) -> None:
    report_path(plan, number).unlink(missing_ok=True)

  with ThreadPoolExecutor(_READERS) as pool:
    list(pool.map(remove_report, range(plan.shards)))
  remove_abandoned(plan.directory)
  storage = manifest.storage
  print(f"{plan.directory}: {manifest.records} records, {manifest.skipped} skipped, {manifest.conversations} "
        f"conversations, {storage.bytes_per_record:,.0f} bytes per record, of it "
        f"{storage.feature_bytes_per_record:,.0f} features (relative error {storage.feature_relative_rmse:.2g}), "
        f"refiner {manifest.fingerprint}", flush=True)
  for reason, count in manifest.dropped.items():
    print(f"left out {count} times: {reason}", flush=True)
  if manifest.skipped:
    print(f"why pictures were skipped: {plan.directory / ERRORS}", flush=True)
  return manifest
