"""The configuration of an export. Importing this file needs no torch: a neural refiner is imported by who uses one."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from refiner_export.common.settings import Settings, from_dict, reachable, require
from refiner_export.records.features import FEATURE_DTYPES
from refiner_export.records.formats import FORMATS
from refiner_export.records.manifest import Manifest
from refiner_export.records.schema import fingerprint
from refiner_export.refiners.base import RefinerSettings
from refiner_export.refiners.classical.imperfect import ImperfectRefiner
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.source import SourceSettings


@dataclasses.dataclass(unsafe_hash=True)
class FeatureSettings(Settings):
  """Which results of the refiner are stored, and how.

  Attributes:
    dtype: `bfloat16`; or `float16`, which is more exact and as large; or `int8` with a scale per row, at half the
      size.
    top_k: how many rows of the detector are kept, beginning with the highest scores; None keeps all. The trainer
      pads.
    masks: whether the segmenter's masks are stored, as COCO's run-length codes. The segmenter must be told to give
      them.
  """
  dtype: str = "bfloat16"
  top_k: int | None = None
  masks: bool = False

  def check(self, path: str) -> None:
    require(self.dtype in FEATURE_DTYPES, f"{path}.dtype: expected one of {FEATURE_DTYPES}, got {self.dtype!r}")
    require(self.top_k is None or self.top_k >= 1, f"{path}.top_k: expected at least 1, got {self.top_k}")

  @property
  def optional_fields(self) -> tuple[str, ...]:
    """The fields of `record.OPTIONAL_FIELDS` that records get."""
    return ("mask_ious", "mask_areas", "mask_rles") if self.masks else ("mask_ious", "mask_areas")


@dataclasses.dataclass(unsafe_hash=True)
class ImageSettings(Settings):
  """The stored picture: the longer side in pixels (larger pictures are shrunk) and the JPEG quality."""
  max_side: int = 512
  quality: int = 95

  def check(self, path: str) -> None:
    require(self.max_side >= 32, f"{path}.max_side: expected at least 32 pixels, got {self.max_side}")
    require(1 <= self.quality <= 100, f"{path}.quality: expected 1 to 100, got {self.quality}")


@dataclasses.dataclass(unsafe_hash=True)
class ReadingSettings(Settings):
  """How pictures are read from storage that fails now and then.

  Attributes:
    timeout: seconds that one read may take.
    tries: how often a picture is read before it is skipped. The pauses between the tries double, from half a second.
    unread: the largest share of a shard's examples that may be skipped because pictures cannot be read. With more, the
      export stops. Pictures that were read and are damaged do not count. Another run tries the skipped ones again.
    megabytes: the memory that all threads of a worker together take to decode pictures.
  """
  timeout: float = 60.0
  tries: int = 4
  unread: float = 0.001
  megabytes: int = 1024

  def check(self, path: str) -> None:
    require(self.timeout > 0, f"{path}.timeout: expected more than 0 seconds, got {self.timeout}")
    require(0 <= self.unread <= 1, f"{path}.unread: expected a share from 0 to 1, got {self.unread}")
    for name in "tries", "megabytes":
      require(getattr(self, name) >= 1, f"{path}.{name}: expected at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(unsafe_hash=True)
class RunnerSettings(Settings):
  """How the work is spread over one machine. Nothing here changes what is written.

  Attributes:
    workers: how many processes refine. Each has its own refiner; worker k runs on GPU k modulo the number of GPUs. With
      0 or 1 no process is started, and the command itself refines.
    threads: how many threads of each worker read, decode and shrink pictures ahead of the refiner.
    prefetch: how many batches these threads are ahead.
    reading: what happens when a picture cannot be read.
  """
  workers: int = 1
  threads: int = 8
  prefetch: int = 2
  reading: ReadingSettings = dataclasses.field(default_factory=ReadingSettings)

  def check(self, path: str) -> None:
    for name, least in ("workers", 0), ("threads", 1), ("prefetch", 0):
      require(getattr(self, name) >= least, f"{path}.{name}: expected at least {least}, got {getattr(self, name)}")


@dataclasses.dataclass(unsafe_hash=True)
class ExportConfig(Settings):
  """One export.

  Attributes:
    output: the directory to write, local or remote.
    source: where examples come from: a class of `refiner_export.sources`, or a class that a user has written.
    refiner: `ClassicalRefiner`, or `NeuralRefiner` of `refiners.neural`.
    format: of the shards, `tfrecord` or `array_record`; the trainer reads both.
    records_per_shard: the most examples of a shard, where the source says how many examples its units hold. A restart
      continues after the last finished shard.
    batch: how many examples the refiner sees at once. A network forms batches of pictures of equal size within them,
      which are full only when this number is several times larger.
    limit: export only the first so many examples; None takes all.
  """
  output: str
  source: SourceSettings
  refiner: RefinerSettings = dataclasses.field(default_factory=ClassicalRefiner)
  features: FeatureSettings = dataclasses.field(default_factory=FeatureSettings)
  image: ImageSettings = dataclasses.field(default_factory=ImageSettings)
  runner: RunnerSettings = dataclasses.field(default_factory=RunnerSettings)
  format: str = "tfrecord"
  records_per_shard: int = 1000
  batch: int = 8
  limit: int | None = None

  def check(self, path: str) -> None:
    require(bool(self.output), f"{path}.output: name the directory to write")
    reachable(self.output)
    require(self.format in FORMATS, f"{path}.format: expected one of {FORMATS}, got {self.format!r}")
    segmenter = getattr(self.refiner, "segmenter", None)
    require(not self.features.masks or getattr(segmenter, "store_masks", False),
            f"{path}.features.masks: the refiner's segmenter gives no masks; SAM-HQ does with "
            f"{path}.refiner.segmenter.store_masks=True")
    for name in ("records_per_shard", "batch", "limit"):
      value = getattr(self, name)
      require(value is None or value >= 1, f"{path}.{name}: expected at least 1, got {value}")


def refiner_from_manifest(manifest: Manifest, files: Mapping[str, str] = MappingProxyType({})) -> RefinerSettings:
  """The settings of the refiner that made a directory, to refine new photos in the same way.

  Args:
    manifest: the directory's manifest.
    files: where the files of a neural refiner lie, by dotted field such as `tagger.checkpoint`.

  Raises:
    UserError: this program makes other features than the directory has; or a file is not named, is missing, or is not
      the file that made the directory.
  """
  described = manifest.refiner
  if described["name"] == "neural":
    from refiner_export.refiners import neural  # it needs torch
    refiner = neural.from_description(described, files)
  else:
    kind = ImperfectRefiner if described["name"] == "imperfect" else ClassicalRefiner
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {name: value for name, value in described.items() if name in known}
    refiner = from_dict(kind, fields, "refiner")
  then, now = _flat(described), _flat(refiner.describe())
  differing = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
  other = f" with another {', '.join(differing)}" if differing else ""
  require(fingerprint(refiner.describe()) == manifest.fingerprint,
          f"records were made by refiner {described['name']} version {described['version']} ({manifest.fingerprint}), "
          f"this program has {now['name']} version {now['version']}{other}: export again")
  return refiner


def _flat(described: dict, prefix: str = "") -> dict:
  """The entries of nested dictionaries, under dotted names."""
  entries = {}
  for name, value in described.items():
    if isinstance(value, dict):
      entries |= _flat(value, f"{prefix}{name}.")
    else:
      entries[f"{prefix}{name}"] = value
  return entries
