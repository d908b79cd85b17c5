"""What an export consists of: which examples go into which shard, decided by the configuration and the source alone."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

from etils import epath

from refiner_export.export.config import ExportConfig
from refiner_export.records.manifest import MANIFEST, shard_name
from refiner_export.records.record import Schema, fingerprint
from refiner_export.common.settings import UserError, require
from refiner_export.common.files import write_atomically
from refiner_export.sources.base import SourceExample

CONFIG = "export_config.json"


@dataclasses.dataclass(frozen=True)
class Plan:
  """All examples of an export, cut into shards. `described` is what the refiner's fingerprint is the hash of."""
  config: ExportConfig
  examples: Sequence[SourceExample]
  described: dict

  @property
  def directory(self) -> epath.Path:
    return epath.Path(self.config.output)

  @property
  def shards(self) -> int:
    return -(-len(self.examples) // self.config.records_per_shard)

  def path(self, number: int) -> epath.Path:
    return self.directory / shard_name(number, self.shards, self.config.format)

  def examples_of(self, number: int) -> Sequence[SourceExample]:
    start = number * self.config.records_per_shard
    return self.examples[start:start + self.config.records_per_shard]

  @functools.cached_property
  def schema(self) -> Schema:
    features = self.config.features
    return Schema(features.dtype, fingerprint(self.described), features.optional_fields, features.top_k)


@functools.lru_cache(maxsize=1)
def read_plan(config: ExportConfig) -> Plan:
  """Reads the source, once in a process, and makes the directory this export's.

  Every process does so for itself, on whichever machine: that all have the same plan is what the directory guards.

  Raises:
    UserError: the source is empty or wrong; the directory was begun with another configuration, or with other texts or
      annotations.
  """
  examples = config.source.examples()[:config.limit]
  require(len(examples) > 0, "config.source: there is no example in it")
  plan = Plan(config, examples, config.refiner.describe())
  _claim(plan)
  return plan


def _claim(plan: Plan) -> None:
  config, directory = plan.config, plan.directory
  # Where the directory lies decides nothing in it, and neither does by whom and how many at once pictures are refined.
  settings = {name: value for name, value in json.loads(config.to_json()).items()
              if name not in ("output", "batch", "runner")}
  settings["source"] |= {"name": config.source.name, "contents": _digest(plan.examples)}
  settings["refiner"] = plan.described
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


def _digest(examples: Sequence[SourceExample]) -> str:
  """The hash of all texts and annotations, so that an edited source is not taken for the one exported before."""
  digest = hashlib.sha256()
  for example in examples:
    objects = [(thing.tag, thing.box) for thing in example.objects]
    digest.update(repr((example.id, example.captions, example.conversations, example.text_boxes, objects)).encode())
  return digest.hexdigest()[:12]
