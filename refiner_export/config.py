"""The configuration of an export."""

import dataclasses

from refiner_export.manifest import Manifest
from refiner_export.record import FEATURE_DTYPES, fingerprint
from refiner_export.refiners.classical import ClassicalRefiner
from refiner_export.settings import Settings, from_dict, require
from refiner_export.sources.coco import Coco
from refiner_export.sources.photos import Photos


@dataclasses.dataclass(unsafe_hash=True)
class FeatureSettings(Settings):
  """How features are stored: `bfloat16`, or `int8` with a scale per row at half the size."""
  dtype: str = "bfloat16"

  def check(self, path: str) -> None:
    require(self.dtype in FEATURE_DTYPES, f"{path}.dtype: expected one of {FEATURE_DTYPES}, got {self.dtype!r}")


@dataclasses.dataclass(unsafe_hash=True)
class ImageSettings(Settings):
  """The stored picture: the longer side in pixels (larger ones are shrunk) and the JPEG quality."""
  max_side: int = 512
  quality: int = 95

  def check(self, path: str) -> None:
    require(self.max_side >= 32, f"{path}.max_side: expected at least 32 pixels, got {self.max_side}")
    require(1 <= self.quality <= 100, f"{path}.quality: expected 1 to 100, got {self.quality}")


@dataclasses.dataclass(unsafe_hash=True)
class ExportConfig(Settings):
  """One export.

  Attributes:
    output: the directory to write, local or remote.
    records_per_shard: how many examples go into one shard; a restart continues after the last finished shard.
    batch: how many pictures the refiner sees at once.
    limit: export only the first so many examples; None takes all.
  """
  output: str
  source: Photos | Coco
  refiner: ClassicalRefiner = dataclasses.field(default_factory=ClassicalRefiner)
  features: FeatureSettings = dataclasses.field(default_factory=FeatureSettings)
  image: ImageSettings = dataclasses.field(default_factory=ImageSettings)
  records_per_shard: int = 1000
  batch: int = 8
  limit: int | None = None

  def check(self, path: str) -> None:
    require(bool(self.output), f"{path}.output: name the directory to write")
    for name in ("records_per_shard", "batch", "limit"):
      value = getattr(self, name)
      require(value is None or value >= 1, f"{path}.{name}: expected at least 1, got {value}")


def refiner_from_manifest(manifest: Manifest) -> ClassicalRefiner:
  """Rebuilds the refiner that made a directory, to refine new photos in the same way.

  Raises `UserError` when this program no longer makes the same features.
  """
  described = manifest.refiner
  known = {field.name for field in dataclasses.fields(ClassicalRefiner)}
  refiner = from_dict(ClassicalRefiner, {name: value for name, value in described.items() if name in known}, "refiner")
  require(fingerprint(refiner.describe()) == manifest.fingerprint,
          f"records were made by refiner {described['name']} version {described['version']} ({manifest.fingerprint}), "
          f"this program has {refiner.describe()['name']} version {refiner.describe()['version']}: export again")
  return refiner
