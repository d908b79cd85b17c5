"""The manifest of an exported directory, and the TFDS metadata that lies beside it."""

import dataclasses
import json

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_info, naming, splits

from refiner_export.record import SCHEMA_VERSION, Schema
from refiner_export.settings import UserError, require
from refiner_export.tfrecord import ShardInfo, write_atomically

MANIFEST = "manifest.json"
NAME, SPLIT = "lyrics_records", "train"


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a directory of records holds. `refiner` is the settings that `fingerprint` is the hash of, with its name."""
  schema_version: int
  fingerprint: str
  feature_dtype: str
  detection_rows: int
  refiner: dict
  source: str
  split: str
  shards: tuple[ShardInfo, ...]
  records: int
  conversations: int
  skipped: int

  @classmethod
  def load(cls, directory: epath.PathLike) -> "Manifest":
    """Reads `manifest.json`. Raises `UserError` when it is missing, damaged or of another schema."""
    path = epath.Path(directory) / MANIFEST
    require(path.exists(), f"no {MANIFEST} in {directory}: run python -m refiner_export --config ... until it ends")
    try:
      fields = json.loads(path.read_text())
      version = fields["schema_version"]
      require(version == SCHEMA_VERSION,
              f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}: export again")
      fields["shards"] = tuple(ShardInfo(**shard) for shard in fields["shards"])
      return cls(**fields)
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(f"{path}: not a manifest ({' '.join(str(error).split())}): export again") from error

  def save(self, directory: epath.PathLike) -> None:
    text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"
    write_atomically(epath.Path(directory) / MANIFEST, text.encode())

  def schema(self) -> Schema:
    return Schema(self.feature_dtype, self.fingerprint)


def shard_name(shard: int, shards: int) -> str:
  """The name that TFDS expects, e.g. `lyrics_records-train.tfrecord-00000-of-00002`."""
  return _file_template(epath.Path(".")).sharded_filepath(shard_index=shard, num_shards=shards).name


def write_tfds_metadata(directory: epath.PathLike, manifest: Manifest) -> None:
  """Writes features.json and dataset_info.json, so that `tfds.builder_from_directory(directory)` works."""
  directory = epath.Path(directory)
  identity = dataset_info.DatasetIdentity(
      name=NAME, version=tfds.core.Version(f"{manifest.schema_version}.0.0"), data_dir=str(directory),
      module_name="refiner_export")
  info = tfds.core.DatasetInfo(
      builder=identity, features=manifest.schema().features,
      description=f"Pictures, texts and visual refiner features ({manifest.source}, refiner {manifest.fingerprint}).")
  info.set_file_format(tfds.core.FileFormat.TFRECORD)
  info.set_splits(splits.SplitDict([splits.SplitInfo(
      name=SPLIT, shard_lengths=[shard.records for shard in manifest.shards],
      num_bytes=sum(shard.bytes for shard in manifest.shards), filename_template=_file_template(directory))]))
  info.write_to_directory(directory)


def _file_template(directory: epath.Path) -> naming.ShardedFileTemplate:
  return naming.ShardedFileTemplate(data_dir=directory, dataset_name=NAME, split=SPLIT, filetype_suffix="tfrecord")
