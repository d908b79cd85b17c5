"""The manifest of an exported directory, and the TFDS metadata that lies beside it."""

import dataclasses
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_info, naming, splits

from refiner_export.common.files import hash_file, reason, write_atomically, writing
from refiner_export.common.sealed import build, parse_object, seal, unseal
from refiner_export.common.settings import UserError, reachable, require
from refiner_export.records import schema_1
from refiner_export.records.features import FeatureSums
from refiner_export.records.formats import FORMATS
from refiner_export.records.record import Record
from refiner_export.records.schema import SCHEMA_VERSION, Schema, check_fields
from refiner_export.records.shard_files import ShardInfo

MANIFEST, ERRORS = "manifest.json", "errors.jsonl"
DAMAGED = "run python -m refiner_export repair with the configuration of the export"
NAME, SPLIT = "lyrics_records", "train"
TFDS_FILES = ("features.json", "dataset_info.json")
_READ_VERSIONS = (schema_1.VERSION, SCHEMA_VERSION)


@dataclasses.dataclass(frozen=True)
class Storage:
  """What a directory takes per record, and how exactly it keeps the refiner's features.

  Attributes:
    bytes_per_record: of the shards' files, on average.
    feature_bytes_per_record: the part of it that features take, with their scales and the detector rows' boxes.
    feature_relative_rmse: root of the mean squared error of all values over that of their mean square.
    feature_mean_cosine: between a row that the refiner gave and the same row as it is read, over all rows.
  """
  bytes_per_record: float
  feature_bytes_per_record: float
  feature_relative_rmse: float
  feature_mean_cosine: float


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a directory of records holds.

  `manifest.json` also states `storage`, for people: it follows from the shards. It begins with its checksum.

  Attributes:
    schema_version: 2, or 1 for a directory of before a record could have several pictures.
    fingerprint: the hash of `refiner`, which is the refiner's settings with its name.
    feature_dtype: how features are stored, one of `FEATURE_DTYPES`.
    detection_rows: the number of detector rows that every picture has.
    source, split: names.
    shards: what is known of each file.
    records, conversations, pictures: totals over the shards.
    skipped: how many examples of the source became no record.
    format: of the shards, one of `FORMATS`.
    optional_fields: the fields of `OPTIONAL_FIELDS` that pictures have.
    dropped: how many texts and annotations were left out, by reason. Those that belong to no example are among them.
    files: the SHA-256 of every other file of the directory, by its name; empty in older directories.
  """
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
  pictures: int
  skipped: int
  format: str = "tfrecord"
  optional_fields: tuple[str, ...] = ()
  dropped: dict = dataclasses.field(default_factory=dict)
  files: dict = dataclasses.field(default_factory=dict)

  @classmethod
  def load(cls, directory: epath.PathLike) -> "Manifest":
    """Reads `manifest.json`. Raises `UserError` when it is missing, damaged or of a schema that is not known."""
    path = reachable(directory) / MANIFEST
    require(path.exists(), f"no {MANIFEST} in {directory}: run python -m refiner_export --config ... until it ends")
    try:
      data = path.read_bytes()
      version = parse_object(data).get("schema_version")
      manifest = None if _is_other_version(version) else _from_fields(unseal(data))
    except (ValueError, TypeError, OSError, UserError) as error:
      raise UserError(f"{path}: not a manifest ({reason(error)}): {DAMAGED}") from error
    require(manifest is not None,
            f"{path}: schema version {version}, this program reads {_READ_VERSIONS[0]} to {_READ_VERSIONS[-1]}: "
            "export again, or update the program")
    require(manifest.format in FORMATS, f"{path}: shards of format {manifest.format!r}, which this program does not "
                                        "know: update it")
    return manifest

  def save(self, directory: epath.PathLike) -> None:
    fields = dataclasses.asdict(self) | {"storage": dataclasses.asdict(self.storage)}
    write_atomically(epath.Path(directory) / MANIFEST, seal(fields, indent=2))

  def check_files(self, directory: epath.PathLike) -> Iterator[str]:
    """A line for each of `files` that is missing or is not as it was written."""
    for name, sha256 in self.files.items():
      path = epath.Path(directory) / name
      try:
        if hash_file(path) != sha256:
          yield f"{path}: its checksum is not that of the manifest, it is damaged or was edited: {DAMAGED}"
      except FileNotFoundError:
        yield f"{path}: missing: {DAMAGED}"
      except OSError as error:
        yield f"{path}: cannot be read ({reason(error)}): {DAMAGED}"

  def schema(self) -> Schema | schema_1.Schema1:
    """What decodes the directory's records."""
    kind = schema_1.Schema1 if self.schema_version == schema_1.VERSION else Schema
    return kind(self.feature_dtype, self.fingerprint, self.optional_fields)

  def as_read(self, record: Record) -> Record:
    """A record that was just made, as a reader of this directory would get it: as few detector rows, and as exact.

    The optional fields are left out.
    """
    schema = Schema(self.feature_dtype, self.fingerprint, (), self.detection_rows)
    return schema.decode(schema.encode(record))

  @property
  def features(self) -> FeatureSums:
    """The sums over all shards."""
    parts = []
    for shard in self.shards:
      parts.append(FeatureSums(*[getattr(shard, field.name) for field in dataclasses.fields(FeatureSums)]))
    return FeatureSums.total(parts)

  @property
  def storage(self) -> Storage:
    features, records = self.features, max(self.records, 1)
    size = sum([shard.bytes for shard in self.shards])
    return Storage(size / records, features.feature_bytes / records, features.relative_rmse, features.mean_cosine)


def shard_name(shard: int, shards: int, format: str = "tfrecord") -> str:
  """The name that TFDS expects, e.g. `lyrics_records-train.tfrecord-00000-of-00002`."""
  return _file_template(epath.Path("."), format).sharded_filepath(shard_index=shard, num_shards=shards).name


def write_tfds_metadata(directory: epath.PathLike, manifest: Manifest) -> None:
  """Writes `TFDS_FILES`, so that `tfds.builder_from_directory(directory)` works."""
  directory = epath.Path(directory)
  identity = dataset_info.DatasetIdentity(
      name=NAME, version=tfds.core.Version(f"{manifest.schema_version}.0.0"), data_dir=str(directory),
      module_name="refiner_export")
  info = tfds.core.DatasetInfo(
      builder=identity, features=manifest.schema().features,
      description=f"Pictures, texts and visual refiner features ({manifest.source}, refiner {manifest.fingerprint}).")
  info.set_file_format(tfds.core.FileFormat(manifest.format))
  info.set_splits(splits.SplitDict([splits.SplitInfo(
      name=SPLIT, shard_lengths=[shard.records for shard in manifest.shards],
      num_bytes=sum(shard.bytes for shard in manifest.shards),
      filename_template=_file_template(directory, manifest.format))]))
  with writing(directory / TFDS_FILES[0]):
    info.write_to_directory(directory)


def _file_template(directory: epath.Path, format: str) -> naming.ShardedFileTemplate:
  return naming.ShardedFileTemplate(data_dir=directory, dataset_name=NAME, split=SPLIT, filetype_suffix=format)


def _is_other_version(version) -> bool:
  """Whether a manifest is of another program, and not merely damaged."""
  return type(version) is int and version not in _READ_VERSIONS


def _from_fields(fields: dict) -> Manifest:
  """Raises `ValueError` or `TypeError` for what cannot be a manifest."""
  if fields.get("schema_version") == schema_1.VERSION:
    _count_pictures(fields)
  fields.pop("storage", None)
  shards = []
  for shard in fields.get("shards", ()):
    shards.append(build(ShardInfo, shard))
    if "/" in shard["file"]:
      raise ValueError(f"shard {shard['file']!r} is not in the directory")
  fields["shards"] = tuple(shards)
  fields["optional_fields"] = tuple(fields.get("optional_fields", ()))
  manifest = build(Manifest, fields)
  check_fields(manifest.feature_dtype, [str(name) for name in manifest.optional_fields])
  if not isinstance(manifest.refiner.get("name"), str):
    raise ValueError("'refiner' has no name")
  for name, sha256 in manifest.files.items():
    if "/" in name or not isinstance(sha256, str):
      raise ValueError(f"file {name!r} is not in the directory")
  return manifest


def _count_pictures(fields: dict) -> None:
  """Adds the numbers that a manifest of schema 1 lacks: every record that was exported had one picture."""
  fields["pictures"] = fields.get("records")
  for shard in fields.get("shards", ()):
    if isinstance(shard, dict):
      shard["pictures"] = shard.get("records")
