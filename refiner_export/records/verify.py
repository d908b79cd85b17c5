"""Reads all of an exported directory again and says what is wrong.

Prints one line for each problem, with shard and record. The exit code is 0 without a problem, 1 with
problems, and 2 when there is nothing to verify.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from PIL import Image

from refiner_export.common.command import Command, Flag, Positional
from refiner_export.common.files import hash_file
from refiner_export.common.progress import Progress
from refiner_export.common.stores import store_errors
from refiner_export.records.formats import Shard, open_shard
from refiner_export.records.manifest import ERRORS, NAME, Manifest
from refiner_export.records.masks import decode_rle
from refiner_export.records.record import Picture, RecordError, check
from refiner_export.records.schema import Schema
from refiner_export.records.schema_1 import Schema1
from refiner_export.records.shard_files import ShardInfo

_AREA_TOLERANCE = 1e-4  # of a mask's share of the picture; float32 adds up to 10^8 pixels
_WINDOW = 64  # records of a shard that are in memory at once, per thread


def _ignore(records: int) -> None:
  """Stands for nobody who wants to know how far the work is."""


def verify(
    directory: epath.PathLike, threads: int = 4, advance: Callable[[int], object] = _ignore,
) -> Iterator[str]:
  """Yields a line for each problem: every byte, record and picture is read, and compared with the manifest.

  Args:
    directory: what an export has written.
    threads: how many threads decode records; reading and decoding pictures release Python's lock.
    advance: called with the number of records that are done since the last call.

  Raises:
    UserError: there is no manifest, or a manifest of an unknown schema.
  """
  directory = epath.Path(directory)
  manifest = Manifest.load(directory)
  schema = manifest.schema()
  first_with: dict[str, tuple[str, int]] = {}  # id -> the file and position of the first record that has it
  with ThreadPoolExecutor(threads) as pool:
    for info in manifest.shards:
      path = directory / info.file
      try:
        shard = open_shard(path, info.index_sha256)
      except RecordError as error:
        yield str(error)
        advance(info.records)
        continue
      yield from _compare(path, info, shard)
      read = functools.partial(_read, shard, schema, manifest)
      for positions in _windows(len(shard), _WINDOW * threads):
        for position, (id, problems) in zip(positions, pool.map(read, positions)):
          for problem in problems:
            yield f"{path}: record {position}: {problem}"
          if id is None:
            continue
          file, earlier = first_with.setdefault(id, (info.file, position))
          if (file, earlier) != (info.file, position):
            yield f"{path}: record {position}: id {id!r} is that of record {earlier} of {file} too"
        advance(len(positions))
  yield from _totals(directory, manifest)


def _windows(records: int, size: int) -> Iterator[range]:
  for start in range(0, records, size):
    yield range(start, min(start + size, records))


def _compare(path: epath.Path, info: ShardInfo, shard: Shard) -> Iterator[str]:
  found = {"records": len(shard), "conversations": int(shard.conversation_counts.sum()),
           "pictures": int(shard.picture_counts.sum()), "bytes": shard.bytes, "sha256": hash_file(path)}
  for name, value in found.items():
    if value != getattr(info, name):
      yield f"{path}: {name} {value}, the manifest says {getattr(info, name)}"


def _read(shard: Shard, schema: Schema | Schema1, manifest: Manifest, position: int) -> tuple[str | None, list[str]]:
  """The id of a record, None when it cannot be read, and what is wrong with the record."""
  try:
    record = schema.decode(shard.read(position))
    check(record)
  except RecordError as error:
    # The line that is printed already says where the record lies.
    return None, [str(error).removeprefix(f"{shard.path}: ").removeprefix(f"record {position} ")]
  problems = []
  for number, caption in enumerate(record.captions):
    if not caption.strip():
      problems.append(f"captions[{number}] is empty")
  for number, picture in enumerate(record.pictures):
    for problem in _picture_problems(picture, manifest):
      problems.append(f"picture {number}: {problem}")
  conversations, pictures = schema.counts(record)
  if conversations != shard.conversation_counts[position]:
    problems.append(f"{conversations} conversations, its index says {shard.conversation_counts[position]}")
  if pictures != shard.picture_counts[position]:
    problems.append(f"{pictures} pictures, its index says {shard.picture_counts[position]}")
  return record.id, problems


def _picture_problems(picture: Picture, manifest: Manifest) -> Iterator[str]:
  yield from _boxes(picture)
  yield from _image(picture)
  yield from _masks(picture)
  if len(picture.detection_features) != manifest.detection_rows:
    yield f"{len(picture.detection_features)} detector rows, the manifest says {manifest.detection_rows}"


def _boxes(picture: Picture) -> Iterator[str]:
  for k, tag in enumerate(picture.tags):
    if not tag.strip():
      yield f"tags[{k}] is empty"
  for name in "boxes", "text_boxes":
    boxes = getattr(picture, name)
    for k in np.flatnonzero(((boxes < 0) | (boxes > 1)).any(axis=1)):
      yield f"{name}[{k}] is not in [0, 1]: {boxes[k].tolist()}"
    for k in np.flatnonzero((boxes[:, :2] > boxes[:, 2:]).any(axis=1)):
      yield f"{name}[{k}] has its corners in the wrong order: {boxes[k].tolist()}"
  if (np.diff(picture.scores) > 0).any():
    yield f"scores are not in descending order: {picture.scores.tolist()}"


def _image(picture: Picture) -> Iterator[str]:
  try:
    image = Image.open(io.BytesIO(picture.image), formats=["JPEG"])
    image.load()
  except Exception as error:  # Pillow's decoders raise many classes of error
    reason = "not a JPEG" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
    yield f"its image cannot be decoded: {reason}"
    return
  if image.size != (picture.width, picture.height):
    yield f"its image is of {image.width}x{image.height} pixels, the record says {picture.width}x{picture.height}"


def _masks(picture: Picture) -> Iterator[str]:
  for k, rle in enumerate(picture.mask_rles):
    try:
      area = decode_rle(rle, picture.height, picture.width).mean()
    except ValueError as error:
      yield f"mask_rles[{k}]: {error}"
      continue
    if k < len(picture.mask_areas) and abs(area - picture.mask_areas[k]) > _AREA_TOLERANCE:
      yield f"mask_rles[{k}] covers {area:.4f} of the picture, mask_areas say {picture.mask_areas[k]:.4f}"


def _totals(directory: epath.Path, manifest: Manifest) -> Iterator[str]:
  for name in "records", "conversations", "pictures":
    stated, total = getattr(manifest, name), sum([getattr(shard, name) for shard in manifest.shards])
    if total != stated:
      yield f"{directory}: the manifest says {stated} {name}, and {total} shard by shard"
  yield from manifest.check_files(directory)
  errors = directory / ERRORS
  try:
    skipped = errors.read_bytes().count(b"\n")
  except OSError:  # an older directory has no such file; `check_files` knows whether this one should
    skipped = 0
  if skipped != manifest.skipped:
    yield f"{errors}: {skipped} skipped examples, the manifest says {manifest.skipped}"
  known = {shard.file for shard in manifest.shards}
  for path in sorted(directory.glob(f"{NAME}-*")):
    if path.name.removesuffix(".index") not in known:
      yield f"{path}: not in the manifest: remove it"


def main(directory: str, threads: int) -> int:
  """Verifies a directory and prints what is wrong. Returns the exit code, 0 or 1. Raises `UserError`."""
  with store_errors(directory):
    manifest, count = Manifest.load(directory), 0
  with store_errors(directory), Progress(manifest.records, unit="record") as progress:
    for problem in verify(directory, threads, progress.add):
      count += 1
      progress.write(problem)
  storage = manifest.storage
  print(f"{directory}: {count or 'no'} problem{'s' * (count != 1)} in {manifest.records} records of "
        f"{len(manifest.shards)} {manifest.format} shards, {manifest.conversations} conversations, "
        f"{storage.bytes_per_record:,.0f} bytes per record", flush=True)
  return 1 if count else 0


COMMAND = Command(
    name="refiner_export verify",
    about=__doc__,
    main=main,
    flags=(Flag("threads", "threads that decode records", default=os.cpu_count() or 1, at_least=1),),
    positional=(Positional("directory", "DIR", "a directory that python -m refiner_export wrote"),),
    examples=("python -m refiner_export verify DIR",),
)

if __name__ == "__main__":
  COMMAND.run()
