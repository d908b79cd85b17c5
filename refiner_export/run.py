"""An export from start to end: plan the shards, write those that are missing, then the manifest.

A directory shows its state: a shard under its final name is finished, `manifest.json` means that everything is. An
export that was stopped goes on where it stopped and ends with the same bytes as one that was not.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence

import tqdm
from etils import epath

from refiner_export import pipeline
from refiner_export.config import ExportConfig
from refiner_export.images import UnreadableImage
from refiner_export.manifest import MANIFEST, SPLIT, Manifest, shard_name, write_tfds_metadata
from refiner_export.reader import RecordDirectory
from refiner_export.record import SCHEMA_VERSION, RecordError, Schema, fingerprint
from refiner_export.settings import UserError, require
from refiner_export.sources.base import SourceExample
from refiner_export.tfrecord import ShardInfo, inspect_shard, write_atomically, write_shard

CONFIG, ERRORS = "export_config.json", "errors.jsonl"


def export(config: ExportConfig) -> Manifest:
  """Makes the directory `config.output` complete and returns its manifest. Raises `UserError`."""
  directory = epath.Path(config.output)
  examples = config.source.examples()[:config.limit]
  require(len(examples) > 0, "config.source: there is no example in it")
  _claim(directory, config, examples)
  if _is_complete(directory):
    print(f"{directory} is complete already", flush=True)
    return _end(directory, Manifest.load(directory))

  size = config.records_per_shard
  plan = [examples[start:start + size] for start in range(0, len(examples), size)]
  described = config.refiner.describe()
  schema = Schema(config.features.dtype, fingerprint(described))

  shards = []
  with _Progress(len(examples)) as progress:
    for number, planned in enumerate(plan):
      path = directory / shard_name(number, len(plan))
      info = _finished(path)
      if info is None:
        info = _write(path, planned, config, schema, progress)
      else:
        progress.skip(len(planned))
      shards.append(info)

  errors = [line for shard in shards for line in _errors_path(directory / shard.file).read_text().splitlines()]
  manifest = Manifest(
      schema_version=SCHEMA_VERSION, fingerprint=schema.fingerprint, feature_dtype=config.features.dtype,
      detection_rows=config.refiner.detector.rows, refiner=described, source=config.source.name, split=SPLIT,
      shards=tuple(shards), records=sum(shard.records for shard in shards),
      conversations=sum(shard.conversations for shard in shards), skipped=len(errors))
  require(manifest.records > 0, f"no picture could be read; the first: {errors[0] if errors else ''}")
  write_atomically(directory / ERRORS, "".join(f"{line}\n" for line in errors).encode())
  write_tfds_metadata(directory, manifest)
  manifest.save(directory)
  return _end(directory, manifest)


def _claim(directory: epath.Path, config: ExportConfig, examples: Sequence[SourceExample]) -> None:
  """Makes the directory this configuration's, or raises `UserError` when it is another's."""
  path = directory / CONFIG
  # Where the directory lies decides nothing in it, and neither does how many pictures are refined at once.
  settings = {name: value for name, value in json.loads(config.to_json()).items() if name not in ("output", "batch")}
  settings["source"] |= {"name": config.source.name, "contents": _digest(examples)}
  settings["refiner"] = config.refiner.describe()
  if not path.exists():
    require(not (directory / MANIFEST).exists(), f"{directory} holds records of unknown origin: name another output")
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    return
  try:
    earlier = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path}: not JSON ({error}): remove the directory or name another output") from None
  differing = sorted(name for name in {*settings, *earlier} if settings.get(name) != earlier.get(name))
  require(not differing, f"{directory} was begun with another config.{', config.'.join(differing)}: "
                         "remove the directory or name another output")


def _digest(examples: Sequence[SourceExample]) -> str:
  """The hash of all texts and annotations, so that an edited source is not taken for the one exported before."""
  digest = hashlib.sha256()
  for example in examples:
    objects = [(thing.tag, thing.box) for thing in example.objects]
    digest.update(repr((example.id, example.captions, example.conversations, example.text_boxes, objects)).encode())
  return digest.hexdigest()[:12]


def _is_complete(directory: epath.Path) -> bool:
  if not (directory / MANIFEST).exists():
    return False
  try:
    RecordDirectory(directory)
  except RecordError:  # a shard was lost or damaged since
    return False
  return True


def _finished(path: epath.Path) -> ShardInfo | None:
  """Describes a shard that an earlier run finished; None when it must be written (again)."""
  if not (path.exists() and _errors_path(path).exists()):
    return None
  try:
    return inspect_shard(path)
  except RecordError as error:
    print(f"writing a shard again: {error}", flush=True)
    return None


def _write(
    path: epath.Path, planned: Sequence[SourceExample], config: ExportConfig, schema: Schema, progress: "_Progress",
) -> ShardInfo:
  errors: list[str] = []

  def records() -> Iterator[tuple[bytes, int]]:
    for start in range(0, len(planned), config.batch):
      batch = planned[start:start + config.batch]
      for result in pipeline.refine(batch, config.refiner, config.image, config.source.name):
        if isinstance(result, UnreadableImage):
          errors.append(json.dumps({"id": result.id, "reason": result.reason}))
        else:
          yield schema.encode(result), len(result.conversations)
      progress.advance(len(batch))
    # Still before the shard gets its name, so that a finished shard always has its list.
    write_atomically(_errors_path(path), "".join(f"{line}\n" for line in errors).encode())

  return write_shard(path, records())


def _errors_path(shard: epath.Path) -> epath.Path:
  """Where the skipped pictures of one shard are kept until the export ends."""
  return shard.parent / f".errors.{shard.name}.jsonl"


def _end(directory: epath.Path, manifest: Manifest) -> Manifest:
  """Removes what only a restart needs, and says what there is."""
  for shard in manifest.shards:
    _errors_path(directory / shard.file).unlink(missing_ok=True)
  size = sum(shard.bytes for shard in manifest.shards)
  print(f"{directory}: {manifest.records} records, {manifest.skipped} skipped, {manifest.conversations} conversations, "
        f"{size // manifest.records:,} bytes per record, refiner {manifest.fingerprint}", flush=True)
  if manifest.skipped:
    print(f"why pictures were skipped: {directory / ERRORS}", flush=True)
  return manifest


class _Progress:
  """A bar with rate and remaining time on a terminal; elsewhere a line at most every `INTERVAL` seconds."""
  INTERVAL = 10.0

  def __init__(self, total: int):
    self._bar = tqdm.tqdm(total=total, unit="picture", file=sys.stderr, disable=not sys.stderr.isatty())
    self._total, self._done, self._refined, self._start = total, 0, 0, time.monotonic()
    self._spoken = self._start

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def skip(self, pictures: int) -> None:
    """Counts pictures that an earlier run did: they say nothing about the speed."""
    self._done += pictures
    if not self._bar.disable:
      self._bar.initial += pictures
      self._bar.update(pictures)

  def advance(self, pictures: int) -> None:
    self._done, self._refined = self._done + pictures, self._refined + pictures
    self._bar.update(pictures)
    now = time.monotonic()
    if self._bar.disable and (now - self._spoken >= self.INTERVAL or self._done == self._total):
      rate = self._refined / max(now - self._start, 1e-6)
      print(f"{self._done} of {self._total} pictures, {rate:.1f} per second, "
            f"{(self._total - self._done) / rate:.0f} s left", flush=True)
      self._spoken = now
