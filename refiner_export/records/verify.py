"""python -m refiner_export.records.verify DIR [--threads N]: reads all of an exported directory again and says what is wrong.

One line per problem, with shard and record. Exit code 0 when there is none, 1 when there are some, 2 when there is
nothing to verify.
"""

import argparse
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
import tqdm
from etils import epath
from PIL import Image

from refiner_export.records.formats import Shard, open_shard
from refiner_export.records.manifest import NAME, Manifest
from refiner_export.records.masks import decode_rle
from refiner_export.records.record import Record, RecordError, Schema, check
from refiner_export.common.settings import UserError, require
from refiner_export.common.files import hash_file
from refiner_export.records.shard_files import ShardInfo

ERRORS = "errors.jsonl"

_AREA_TOLERANCE = 1e-4  # of a mask's share of the picture; float32 adds up to 10^8 pixels
_WINDOW = 64  # records of a shard that are in memory at once, per thread


def verify(
    directory: epath.PathLike, threads: int = 4, advance: Callable[[int], None] = lambda records: None,
) -> Iterator[str]:
  """Yields a line for each problem: every byte, record and picture is read, and compared with the manifest.

  Args:
    directory: what an export has written.
    threads: that decode records; reading and decoding pictures let go of Python's lock.
    advance: called with the number of records that are done since the last call.

  Raises:
    UserError: there is no manifest, or one of another schema.
  """
  directory = epath.Path(directory)
  manifest = Manifest.load(directory)
  schema, first_with = manifest.schema(), {}
  with ThreadPoolExecutor(threads) as pool:
    for info in manifest.shards:
      path = directory / info.file
      try:
        shard = open_shard(path)
      except RecordError as error:
        yield str(error)
        advance(info.records)
        continue
      yield from _compare(path, info, shard)
      for start in range(0, len(shard), _WINDOW * threads):
        positions = range(start, min(start + _WINDOW * threads, len(shard)))
        for position, (id, problems) in zip(
            positions, pool.map(lambda position: _read(shard, position, schema, manifest), positions)):
          yield from (f"{path}: record {position}: {problem}" for problem in problems)
          if id is not None and first_with.setdefault(id, (info.file, position)) != (info.file, position):
            file, earlier = first_with[id]
            yield f"{path}: record {position}: id {id!r} is that of record {earlier} of {file} too"
        advance(len(positions))
  yield from _totals(directory, manifest)


def _compare(path: epath.Path, info: ShardInfo, shard: Shard) -> Iterator[str]:
  found = {"records": len(shard), "conversations": int(shard.conversation_counts.sum()), "bytes": shard.bytes,
           "sha256": hash_file(path)}
  for name, value in found.items():
    if value != getattr(info, name):
      yield f"{path}: {name} {value}, the manifest says {getattr(info, name)}"


def _read(shard: Shard, position: int, schema: Schema, manifest: Manifest) -> tuple[str | None, list[str]]:
  """The id of a record, unless it cannot be read, and what is wrong with it."""
  try:
    record = schema.decode(shard.read(position))
    check(record)
  except RecordError as error:  # a reader has said already where
    return None, [str(error).removeprefix(f"{shard.path}: ").removeprefix(f"record {position} ")]
  conversations = int(shard.conversation_counts[position])
  return record.id, list(itertools.chain(
      _boxes(record), _picture(record), _masks(record), _counts(record, conversations, manifest)))


def _boxes(record: Record) -> Iterator[str]:
  for name in "boxes", "text_boxes":
    boxes = getattr(record, name)
    for k in np.flatnonzero(((boxes < 0) | (boxes > 1)).any(axis=1)):
      yield f"{name}[{k}] is not in [0, 1]: {boxes[k].tolist()}"
    for k in np.flatnonzero((boxes[:, :2] > boxes[:, 2:]).any(axis=1)):
      yield f"{name}[{k}] has its corners in the wrong order: {boxes[k].tolist()}"
  if (np.diff(record.scores) > 0).any():
    yield f"scores are not in descending order: {record.scores.tolist()}"


def _picture(record: Record) -> Iterator[str]:
  if not record.image:  # a record of text alone
    return
  try:
    image = Image.open(io.BytesIO(record.image), formats=["JPEG"])
    image.load()
  except Exception as error:  # see `images.open_upright`
    reason = "not a JPEG" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
    yield f"its picture cannot be decoded: {reason}"
    return
  if image.size != (record.width, record.height):
    yield f"its picture is of {image.width}x{image.height} pixels, the record says {record.width}x{record.height}"


def _masks(record: Record) -> Iterator[str]:
  for k, rle in enumerate(record.mask_rles):
    try:
      area = decode_rle(rle, record.height, record.width).mean()
    except ValueError as error:
      yield f"mask_rles[{k}]: {error}"
      continue
    if k < len(record.mask_areas) and abs(area - record.mask_areas[k]) > _AREA_TOLERANCE:
      yield f"mask_rles[{k}] covers {area:.4f} of the picture, mask_areas say {record.mask_areas[k]:.4f}"


def _counts(record: Record, conversations: int, manifest: Manifest) -> Iterator[str]:
  if len(record.detection_features) != manifest.detection_rows:
    yield f"{len(record.detection_features)} detector rows, the manifest says {manifest.detection_rows}"
  if len(record.conversations) != conversations:
    yield f"{len(record.conversations)} conversations, its index says {conversations}"


def _totals(directory: epath.Path, manifest: Manifest) -> Iterator[str]:
  for name in "records", "conversations":
    total = sum(getattr(shard, name) for shard in manifest.shards)
    if total != getattr(manifest, name):
      yield f"{directory}: the manifest says {getattr(manifest, name)} {name}, and {total} shard by shard"
  errors = directory / ERRORS
  skipped = len(errors.read_text().splitlines()) if errors.exists() else 0
  if skipped != manifest.skipped:
    yield f"{errors}: {skipped} skipped pictures, the manifest says {manifest.skipped}"
  known = {shard.file for shard in manifest.shards}
  for path in sorted(directory.glob(f"{NAME}-*")):
    if path.name.removesuffix(".index") not in known:
      yield f"{path}: not in the manifest: remove it"


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise UserError(f"{message} (usage: python -m refiner_export.records.verify DIR [--threads N])")


def main(arguments: list[str]) -> int:
  """Verifies a directory and prints what it finds; returns the exit code, 0 or 1. Raises `UserError`."""
  parser = _Parser(prog="python -m refiner_export.records.verify", description="Reads all of an exported directory again.")
  parser.add_argument("directory", metavar="DIR", help="a directory that python -m refiner_export wrote")
  parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads that decode records")
  options = parser.parse_args(arguments)
  require(options.threads >= 1, f"--threads: expected at least 1, got {options.threads}")
  manifest, count = Manifest.load(options.directory), 0
  with tqdm.tqdm(total=manifest.records, unit="record", file=sys.stderr) as bar:
    for count, problem in enumerate(verify(options.directory, options.threads, bar.update), start=1):
      bar.write(problem, file=sys.stdout)
  storage = manifest.storage
  print(f"{options.directory}: {count or 'no'} problem{'s' * (count != 1)} in {manifest.records} records of "
        f"{len(manifest.shards)} {manifest.format} shards, {manifest.conversations} conversations, "
        f"{storage.bytes_per_record:,.0f} bytes per record", flush=True)
  return 1 if count else 0


def run(arguments: list[str]) -> NoReturn:
  """`main` as a command, which exits with its code, or with 2 and one line for a `UserError`."""
  try:
    sys.exit(main(arguments))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  run(sys.argv[1:])
