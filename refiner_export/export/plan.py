"""The plan of an export: which examples go into which shard, decided by the configuration and the source alone.

The plan holds units of the source, not examples: a unit of known size is cut into output shards of at most
`config.records_per_shard` examples, and a unit of unknown size is one output shard.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from refiner_export.common.files import write_atomically
from refiner_export.common.settings import UserError, require
from refiner_export.export.config import ExportConfig
from refiner_export.records.manifest import MANIFEST, shard_name
from refiner_export.records.schema import SCHEMA_VERSION, Schema, fingerprint
from refiner_export.sources.source import Unit

CONFIG = "export_config.json"


@dataclasses.dataclass(frozen=True)
class UnitSlice:
  """What one output shard is made of: examples `start` to `stop` (exclusive) of a unit; None means up to the end."""
  unit: Unit
  start: int
  stop: int | None

  @property
  def count(self) -> int | None:
    """How many examples are planned; None when only reading the unit tells."""
    return None if self.stop is None else self.stop - self.start


@dataclasses.dataclass(frozen=True)
class ExportPlan:
  """All shards of an export.

  Attributes:
    config: the configuration.
    units: what the source is made of, in order.
    counts: how many examples of each unit are exported; None where only reading the unit tells.
    ends: int64 (units,), the number of output shards of a unit and all units before it.
    described: the refiner's settings; the refiner's fingerprint is their hash.
  """
  config: ExportConfig
  units: Sequence[Unit]
  counts: Sequence[int | None]
  ends: np.ndarray
  described: dict

  @property
  def directory(self) -> epath.Path:
    return epath.Path(self.config.output)

  @property
  def shards(self) -> int:
    return int(self.ends[-1]) if len(self.ends) else 0

  def path(self, number: int) -> epath.Path:
    return self.directory / shard_name(number, self.shards, self.config.format)

  def slice_of(self, number: int) -> UnitSlice:
    """What shard `number` is made of, 0 <= number < shards."""
    position = int(np.searchsorted(self.ends, number, side="right"))
    unit, count = self.units[position], self.counts[position]
    if count is None:
      return UnitSlice(unit, 0, None)
    first = int(self.ends[position - 1]) if position else 0
    start = (number - first) * self.config.records_per_shard
    return UnitSlice(unit, start, min(start + self.config.records_per_shard, count))

  @functools.cached_property
  def schema(self) -> Schema:
    features = self.config.features
    return Schema(features.dtype, fingerprint(self.described), features.optional_fields, features.top_k)


@functools.lru_cache(maxsize=1)
def read_plan(config: ExportConfig) -> ExportPlan:
  """Asks the source for its units, once in a process, and makes the directory this export's.

  Every process makes the plan by itself, on whichever machine. The directory makes sure that all have the same plan.

  Raises:
    UserError: the source is empty or wrong; or the directory was begun with another configuration, or with other units.
  """
  units, counts = _limited_units(config)
  shards = [_output_shards(count, config.records_per_shard) for count in counts]
  plan = ExportPlan(config, units, counts, np.cumsum(shards, dtype=np.int64), config.refiner.describe())
  require(plan.shards > 0, "config.source: there is no example in it")
  _claim(plan)
  return plan


def _limited_units(config: ExportConfig) -> tuple[list[Unit], list[int | None]]:
  """The units to export, and how many examples of each: the first `config.limit` examples in all.

  Whether the limit is reached depends on the counts of all units before. So with a limit a unit of unknown size is read
  here until its end or the limit, without its pictures.
  """
  units = list(config.source.shards())
  names = {unit.name for unit in units}
  require(len(names) == len(units), "config.source: two of its units have the same name: mend its method shards")
  if config.limit is None:
    return units, [unit.count for unit in units]
  counts, left = [], config.limit
  for unit in units:
    if left == 0:
      break
    count = unit.count
    if count is None:
      count = sum(1 for _ in itertools.islice(config.source.read(unit), left))
    counts.append(min(count, left))
    left -= counts[-1]
  return units[:len(counts)], counts


def _output_shards(count: int | None, records_per_shard: int) -> int:
  return 1 if count is None else -(-count // records_per_shard)


def _claim(plan: ExportPlan) -> None:
  """Writes what decides the bytes of the directory into it, or compares with what the first process has written."""
  config, directory = plan.config, plan.directory
  settings = json.loads(config.to_json())
  # These three decide nothing in the directory: where it lies, and how many pictures are refined at once, by whom.
  for name in ("output", "batch", "runner"):
    del settings[name]
  settings["source"] |= {"name": config.source.name, "units": _digest(plan)}
  settings["refiner"] = plan.described
  settings["schema_version"] = SCHEMA_VERSION
  path = directory / CONFIG
  if not path.exists():
    require(not (directory / MANIFEST).exists(), f"{directory} holds records of unknown origin: name another output")
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
  try:
    begun = json.loads(path.read_text())  # also after writing: another process may have begun at the same moment
  except ValueError as error:
    raise UserError(f"{path}: not JSON ({error}): remove the directory or name another output") from None
  differing = sorted(name for name in {*settings, *begun} if settings.get(name) != begun.get(name))
  require(not differing, f"{directory} was begun with another config.{', config.'.join(differing)}: "
                         "remove the directory or name another output")


def _digest(plan: ExportPlan) -> str:
  """The hash of all units, so that an edited source is not taken for the source that was exported before."""
  digest = hashlib.sha256()
  for unit, count in zip(plan.units, plan.counts, strict=True):
    digest.update(repr((unit.name, count, unit.version)).encode())
  return digest.hexdigest()[:12]
