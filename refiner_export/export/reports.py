"""What is known of a finished shard. It lies beside the shard while an export goes on, and then in one file.

`reports.jsonl` has a line with a checksum for every shard. It says again what `manifest.json` and `errors.jsonl` say.
So any of the three files can be lost or damaged, and no shard has to be made again for it.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence

from etils import epath

from refiner_export.common.files import write_atomically
from refiner_export.common.images import UnreadableImage
from refiner_export.common.sealed import build, parse_object, seal, unseal
from refiner_export.common.settings import UserError
from refiner_export.records.manifest import ERRORS, MANIFEST, Manifest
from refiner_export.records.shard_files import ShardInfo

REPORTS = "reports.jsonl"
_UNREAD = "reading"


@dataclasses.dataclass(frozen=True)
class Report:
  """A finished shard.

  Attributes:
    shard: what is in it.
    skipped: the examples that are missing from it: `id` and `reason` of each, in their order. A `cause` says that the
      pictures could not be read, and that nothing is known to be wrong with them.
    damage: what a look at every byte has found wrong with the shard, which is then made again; "" for a good shard.
  """
  shard: ShardInfo
  skipped: tuple[dict[str, str], ...]
  damage: str = ""

  def to_line(self) -> bytes:
    """One line of JSON with its checksum."""
    return seal(dataclasses.asdict(self))

  @property
  def has_unread(self) -> bool:
    """Whether an example is missing because its pictures could not be read. That may pass."""
    for entry in self.skipped:
      if entry.get("cause") == _UNREAD:
        return True
    return False

  @classmethod
  def from_line(cls, line: bytes) -> "Report":
    """Raises `ValueError` or `TypeError` for a damaged line."""
    fields = unseal(line)
    shard = build(ShardInfo, fields.get("shard"))
    skipped = tuple(fields.get("skipped", ()))
    for entry in skipped:
      if not isinstance(entry, dict):
        raise ValueError("a skipped example has neither id nor reason")
    return build(cls, fields | {"shard": shard, "skipped": skipped})


def skip_of(found: UnreadableImage) -> dict[str, str]:
  """What a report says of an example that is skipped."""
  skipped = {"id": found.id, "reason": found.reason}
  return skipped | {"cause": _UNREAD} if found.is_unread else skipped


def write_reports(directory: epath.Path, reports: Sequence[Report]) -> None:
  """Writes `reports.jsonl` and `errors.jsonl`."""
  lines, errors = [], []
  for report in reports:
    lines.append(report.to_line())
    for error in report.skipped:
      errors.append(f"{json.dumps(error)}\n".encode())
  write_atomically(directory / REPORTS, b"".join(lines))
  write_atomically(directory / ERRORS, b"".join(errors))


def kept_reports(directory: epath.Path) -> dict[str, Report]:
  """File name of a shard -> its report, as far as the files of a complete directory tell. Damage is left out."""
  versions = []
  for name in MANIFEST, REPORTS, ERRORS:
    try:
      stat = (directory / name).stat()
      versions.append((stat.length, stat.mtime))
    except OSError:
      versions.append(None)
  return _kept_reports(str(directory), tuple(versions))


# Cached, because a large export asks for many shards. A file that was written again has another size or time.
@functools.lru_cache(maxsize=1)
def _kept_reports(directory: str, versions: tuple) -> dict[str, Report]:
  reports = _reports_of_manifest(epath.Path(directory))
  for line in _read_lines(epath.Path(directory) / REPORTS):
    try:
      report = Report.from_line(line)
    except (ValueError, TypeError):
      continue
    reports[report.shard.file] = report
  return reports


def _reports_of_manifest(directory: epath.Path) -> dict[str, Report]:
  try:
    manifest = Manifest.load(directory)
  except UserError:  # lost or damaged
    return {}
  errors = _errors(directory, manifest)
  reports, start = {}, 0
  for shard in manifest.shards:
    # The lines of the file are in the order of the shards.
    end = start + shard.skipped
    if errors is not None or shard.skipped == 0:
      reports[shard.file] = Report(shard, tuple(errors[start:end]) if errors else ())
    start = end
  return reports


def _errors(directory: epath.Path, manifest: Manifest) -> list[dict] | None:
  """The lines of `errors.jsonl`; None when the file is not the one that the manifest knows."""
  for problem in manifest.check_files(directory):
    if problem.startswith(f"{directory / ERRORS}:"):
      return None
  try:
    lines = [parse_object(line) for line in _read_lines(directory / ERRORS)]
  except ValueError:
    return None
  return lines if len(lines) == manifest.skipped else None


def _read_lines(path: epath.Path) -> list[bytes]:
  try:
    return path.read_bytes().splitlines(keepends=True)
  except OSError:
    return []
