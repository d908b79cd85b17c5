"""The plan of an export: which examples go into which shard, decided by the configuration and the source alone.

The plan holds units of the source, not examples: a unit of known size is cut into output shards of at most
`config.records_per_shard` examples, and a unit of unknown size is one output shard.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from refiner_export.common.files import reason, write_atomically, writing
from refiner_export.common.sealed import seal, unseal
from refiner_export.common.settings import UserError, require
from refiner_export.export.config import ExportConfig
from refiner_export.records.manifest import MANIFEST, Manifest, shard_name
from refiner_export.records.schema import SCHEMA_VERSION, Schema, fingerprint
from refiner_export.sources.source import Unit

CONFIG = "export_config.json"

_NAMED_UNITS = 64  # a source of at most so many units has the versions of their parts in export_config.json


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
    return epath.Path(os.path.expanduser(self.config.output))

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

  def made_of(self, number: int) -> str:
    """The hash of all that decides shard `number`. A shard of another plan with the same hash has the same bytes."""
    part = self.slice_of(number)
    text = repr((self._settings_digest, part.unit.name, part.unit.version, part.start, part.stop))
    return hashlib.sha256(text.encode()).hexdigest()[:12]

  @functools.cached_property
  def _settings_digest(self) -> str:
    settings = deciding_settings(self)
    del settings["limit"], settings["source"]["units"], settings["source"]["parts"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

  @functools.cached_property
  def schema(self) -> Schema:
    features = self.config.features
    return Schema(features.dtype, fingerprint(self.described), features.optional_fields, features.top_k)


def clear_plans() -> None:
  """Has the source asked again: it may have been edited since."""
  read_plan.cache_clear()
  make_plan.cache_clear()


@functools.lru_cache(maxsize=1)
def read_plan(config: ExportConfig) -> ExportPlan:
  """Asks the source for its units, once in a process, and makes the directory this export's.

  Every process makes the plan by itself, on whichever machine. The directory makes sure that all have the same plan.

  Raises:
    UserError: the source is empty or wrong; or the directory was begun with another configuration, or with other units.
  """
  plan = make_plan(config)
  _claim(plan)
  return plan


@functools.lru_cache(maxsize=1)
def make_plan(config: ExportConfig) -> ExportPlan:
  """The plan alone; the directory is not looked at. Raises `UserError` for a source that is empty or wrong."""
  plan = plan_of(config, *limited_units(config, config.limit))
  require(plan.shards > 0, "config.source: there is no example in it")
  return plan


def plan_of(config: ExportConfig, units: Sequence[Unit], counts: Sequence[int | None]) -> ExportPlan:
  """Cuts so many examples of each unit into shards."""
  shards = [_output_shards(count, config.records_per_shard) for count in counts]
  return ExportPlan(config, units, counts, np.cumsum(shards, dtype=np.int64), config.refiner.describe())


def limited_units(config: ExportConfig, limit: int | None) -> tuple[list[Unit], list[int | None]]:
  """The units to export, and how many examples of each: the first `limit` examples in all.

  Whether the limit is reached depends on the counts of all units before. So with a limit a unit of unknown size is read
  here until its end or the limit, without its pictures.
  """
  units = list(config.source.shards())
  names = {unit.name for unit in units}
  require(len(names) == len(units), "config.source: two of its units have the same name: mend its method shards")
  if limit is None:
    return units, [unit.count for unit in units]
  counts, left = [], limit
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


def deciding_settings(plan: ExportPlan) -> dict:
  """What decides the bytes of the directory, as `export_config.json` states it."""
  config = plan.config
  settings = json.loads(config.to_json())
  # These three decide nothing in the directory: where it lies, and how many pictures are refined at once, by whom.
  for name in ("output", "batch", "runner"):
    del settings[name]
  settings["source"] |= {"name": config.source.name, "units": _digest(plan), "parts": _parts(plan)}
  settings["refiner"] = plan.described
  settings["schema_version"] = SCHEMA_VERSION
  return settings


def _claim(plan: ExportPlan) -> None:
  """Writes what decides the bytes of the directory into it, or compares with what the first process has written."""
  directory, settings = plan.directory, deciding_settings(plan)
  begun = begun_with(directory)
  if begun != settings and (begun is None or _vouches(directory, settings)):
    require(begun is not None or _may_own(directory, settings),
            f"{directory} holds records of unknown origin: name another output")
    write_settings(directory, settings)
    begun = begun_with(directory) or {}  # another process may have begun at the same moment
  differing = sorted(name for name in {*settings, *begun} if settings.get(name) != begun.get(name))
  require(not differing, f"{directory} was begun with another config.{', config.'.join(differing)}: "
                         f"{_edited(settings, begun)}remove the directory or name another output")


def write_settings(directory: epath.Path, settings: dict) -> None:
  """Writes `export_config.json`. Raises `UserError` when that is impossible."""
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  write_atomically(directory / CONFIG, seal(settings, indent=2))


def begun_with(directory: epath.Path) -> dict | None:
  """What `export_config.json` states; None when it is lost or damaged. Raises `UserError` when it cannot be read."""
  path = directory / CONFIG
  try:
    begun = unseal(path.read_bytes())
  except FileNotFoundError:
    return None
  except ValueError as error:
    print(f"writing {path} again: {error}", flush=True)
    return None
  except OSError as error:
    raise UserError(f"config.output={directory}: cannot be read ({reason(error)}): name another output") from None
  return begun if {"image", "records_per_shard"} <= begun.keys() else None  # else it is the content of another file


def _may_own(directory: epath.Path, settings: dict) -> bool:
  """Whether a directory without a whole `export_config.json` may get this one: a whole manifest must know it.

  Reports of shards need not be asked here: each says what its shard was made of.
  """
  if not (directory / MANIFEST).exists():
    return True
  try:
    Manifest.load(directory)
  except UserError:  # it is damaged too
    return True
  return _vouches(directory, settings)


def _vouches(directory: epath.Path, settings: dict) -> bool:
  """Whether the manifest says that `export_config.json` held these settings."""
  try:
    stated = Manifest.load(directory).files.get(CONFIG)
  except UserError:
    return False
  return stated == hashlib.sha256(seal(settings, indent=2)).hexdigest()


def _parts(plan: ExportPlan) -> dict[str, str]:
  """The versions of what units are made of. A source of many units has one hash alone, because this text is short."""
  parts = {}
  for unit in plan.units[:_NAMED_UNITS]:
    for name, version in unit.parts:
      parts[f"{name} of {unit.name}"] = version
  return parts if len(plan.units) <= _NAMED_UNITS else {}


def _edited(settings: dict, begun: dict) -> str:
  """Names the parts of the source that were edited; "" when nobody knows."""
  try:
    now, then = settings["source"]["parts"], begun["source"]["parts"]
    names = sorted(name for name in now if then[name] != now[name])
  except (KeyError, TypeError):  # the directory was begun by an earlier version, or with another source
    return ""
  return f"edited since: {', '.join(names)}: " if names else ""


def _digest(plan: ExportPlan) -> str:
  """The hash of all units, so that an edited source is not taken for the source that was exported before."""
  digest = hashlib.sha256()
  for unit, count in zip(plan.units, plan.counts, strict=True):
    digest.update(described_unit(unit, count))
  return digest.hexdigest()[:12]


def described_unit(unit: Unit, count: int | None) -> bytes:
  """What the hash of all units takes of one."""
  return repr((unit.name, count, unit.version)).encode()
