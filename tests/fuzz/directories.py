"""Damaged directories: whatever happened to whichever file, a reader says so in one line, and a repair mends it."""

import collections
import contextlib
import io
import json
import pathlib
import random
import shutil
import sys
import traceback

from tiny_source import Tiny

from refiner_export.common.settings import UserError
from refiner_export.export.config import ExportConfig, ImageSettings
from refiner_export.export.repair import repair
from refiner_export.export.run import export
from refiner_export.records.formats import open_shard, write_shard
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.shard_files import ShardItem
from refiner_export.records.verify import verify
from refiner_export.refiners.classical.refiner import ClassicalRefiner

FULL, SMALL = 1_000, 60
FORMATS = "tfrecord", "array_record"
_JSON = [None, True, -1, 10**30, 1.5, float("nan"), "", "../x", [], [[]], {}, {"a": {"b": []}}, "\ud800"]


def make_config(output: pathlib.Path, format: str, pictures: int = 6) -> ExportConfig:
  config = ExportConfig(str(output), Tiny(pictures), ClassicalRefiner(grid=1),
                        image=ImageSettings(max_side=32, quality=10), records_per_shard=2, format=format)
  config.finalize()
  return config


def read_all(directory: pathlib.Path) -> list:
  """Everything that a trainer gets."""
  records = RecordDirectory(directory)
  read = [repr(records[position]) for position in range(len(records))]
  return [read, records.read_conversation_counts().tolist(), records.read_picture_counts().tolist(),
          repr(records.manifest)]


def contents(directory: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def quietly(function, *arguments):
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    return function(*arguments)


# --- kinds of damage: each changes the file `path`; `draw` decides where and how ---


def flip_bits(path: pathlib.Path, draw: random.Random) -> None:
  data = bytearray(path.read_bytes())
  for _ in range(draw.choice([1, 2, 3, 20])):
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
  path.write_bytes(data)


def lose(path: pathlib.Path, draw: random.Random) -> None:
  path.unlink()


def empty(path: pathlib.Path, draw: random.Random) -> None:
  path.write_bytes(b"")


def cut_short(path: pathlib.Path, draw: random.Random) -> None:
  data = path.read_bytes()
  path.write_bytes(data[:draw.randrange(len(data))])


def cut_out(path: pathlib.Path, draw: random.Random) -> None:
  data = path.read_bytes()
  start = draw.randrange(len(data))
  path.write_bytes(data[:start] + data[start + draw.randrange(1, 9):])


def add_bytes(path: pathlib.Path, draw: random.Random) -> None:
  data = path.read_bytes()
  start = draw.choice([len(data), draw.randrange(len(data))])
  path.write_bytes(data[:start] + draw.randbytes(draw.randrange(1, 30)) + data[start:])


def overwrite(path: pathlib.Path, draw: random.Random) -> None:
  """A block of zeros, of ones or of noise, as a bad sector leaves it."""
  data = bytearray(path.read_bytes())
  start, size = draw.randrange(len(data)), draw.choice([1, 16, 512])
  block = draw.choice([bytes(size), b"\xff" * size, draw.randbytes(size)])
  data[start:start + size] = block[:len(data) - start]
  path.write_bytes(data)


def noise(path: pathlib.Path, draw: random.Random) -> None:
  path.write_bytes(draw.randbytes(path.stat().st_size))


def another_file(path: pathlib.Path, draw: random.Random) -> None:
  other = draw.choice(sorted(path.parent.iterdir()))
  path.write_bytes(other.read_bytes())


def swap(path: pathlib.Path, draw: random.Random) -> None:
  other = draw.choice(sorted(path.parent.iterdir()))
  ours, its = path.read_bytes(), other.read_bytes()
  path.write_bytes(its)
  other.write_bytes(ours)


def folder_instead(path: pathlib.Path, draw: random.Random) -> None:
  path.unlink()
  path.mkdir()


def nest(path: pathlib.Path, draw: random.Random) -> None:
  path.write_bytes(draw.choice([b"[", b'{"a":']) * 100_000)


def other_json(path: pathlib.Path, draw: random.Random) -> None:
  """One value anywhere in the file becomes another; the checksum is taken away. Other files get a JSON value."""
  try:
    fields = json.loads(path.read_bytes())
  except ValueError:
    fields = None
  if not isinstance(fields, dict):
    path.write_text(json.dumps(draw.choice(_JSON)))
    return
  fields.pop("checksum", None)
  inside = fields
  while True:
    key = draw.choice(sorted(inside)) if isinstance(inside, dict) else draw.randrange(len(inside))
    if not isinstance(inside[key], dict | list) or not inside[key] or draw.random() < 0.3:
      break
    inside = inside[key]
  if draw.random() < 0.2:
    del inside[key]
  else:
    inside[key] = draw.choice(_JSON)
  path.write_text(json.dumps(fields, indent=2, sort_keys=True))


def other_record(path: pathlib.Path, draw: random.Random) -> None:
  """A record whose bytes are wrong and whose checksums are right, as another program might write it."""
  path = path.parent / draw.choice(sorted(path.parent.glob("lyrics_records-*[0-9]"))).name
  shard = open_shard(path)
  counts = list(zip(shard.conversation_counts.tolist(), shard.picture_counts.tolist()))
  payloads = [bytearray(shard.read(position)) for position in range(len(shard))]
  for payload in payloads[:1]:
    for _ in range(draw.choice([1, 2, 30])):
      payload[draw.randrange(len(payload))] = draw.randrange(256)
  write_shard(path, [ShardItem(bytes(payload), *numbers) for payload, numbers in zip(payloads, counts)])


KINDS = (flip_bits, lose, empty, cut_short, cut_out, add_bytes, overwrite, noise, another_file, swap, folder_instead,
         nest, other_json, other_record)


# --- the fuzz ---


def run(count: int, seed: int, folder: pathlib.Path) -> collections.Counter:
  """`count` damaged directories: each is read, verified and repaired."""
  ends = collections.Counter()
  whole, expected = {}, {}
  for format in FORMATS:
    whole[format] = folder / format
    quietly(export, make_config(whole[format], format))
    expected[format] = read_all(whole[format])
  for number in range(count):
    draw, format = random.Random(f"{seed} {number}"), FORMATS[number % 2]
    damaged = shutil.copytree(whole[format], folder / "damaged")
    names = sorted(path.name for path in damaged.iterdir())
    name, kind = names[number // 2 % len(names)], draw.choice(KINDS)
    kind(damaged / name, draw)
    what = f"directory {number} of seed {seed}: {kind.__name__} on {name}"
    changed = any(path.is_dir() or path.read_bytes() != (whole[format] / path.name).read_bytes()
                  for path in damaged.iterdir()) or len(list(damaged.iterdir())) < len(names)
    ends[_end(damaged, whole[format], expected[format], kind, changed, what)] += 1
    shutil.rmtree(damaged)
  return ends


def _end(damaged, whole, expected, kind, changed, what) -> str:
  try:
    refused = False
    try:
      accepted = read_all(damaged) == expected
    except UserError as error:
      refused = accepted = "\n" not in str(error)
    verified = False
    with contextlib.suppress(UserError):
      verified = not list(verify(damaged, threads=1))
    try:
      quietly(repair, make_config(damaged, whole.name), 1)
    except UserError as error:
      if kind is folder_instead and "\n" not in str(error):  # nothing of ours removes a folder of a person
        return "refused, to be mended by hand"
      print(f"{what}: not repaired: {error}", file=sys.stderr)
      return "wrong"
  except Exception:
    print(f"{what}:\n{traceback.format_exc()}", file=sys.stderr)
    return "traceback"
  if kind is other_json and not refused:  # an edit with sense that no checksum guards is no damage
    return "edited"
  # An ArrayRecord file is padded to blocks of 64 KiB, and its library does not look at the padding.
  forged = kind is other_record and not verified and not refused
  padding = "array_record" in what and accepted and not verified and not refused
  if not forged and (not accepted or changed and not refused and not padding):
    print(f"{what}: not noticed", file=sys.stderr)
    return "wrong"
  if contents(damaged) != contents(whole):
    print(f"{what}: other bytes after the repair", file=sys.stderr)
    return "wrong"
  if forged:
    return "forged, seen by verify, then repaired"
  if padding:
    return "padding, seen by verify, then repaired"
  return "refused, then repaired" if refused else "not changed"


def flip_every_bit(step: int, seed: int, folder: pathlib.Path) -> collections.Counter:
  """Flips the bits of every file of a small directory, one at a time, and reads all of it: every flip is noticed.

  Args:
    step: only one of so many bits is flipped; every file has its turn.
    seed: decides which.
    folder: an empty folder.
  """
  ends = collections.Counter()
  quietly(export, make_config(folder / "bits", "tfrecord", pictures=3))
  for path in sorted((folder / "bits").iterdir()):
    whole = path.read_bytes()
    for bit in range(seed % step, 8 * len(whole), step):
      data = bytearray(whole)
      data[bit // 8] ^= 1 << bit % 8
      path.write_bytes(data)
      ends[_read_end(folder / "bits", f"bit {bit} of {path.name}")] += 1
    path.write_bytes(whole)
  return ends


def _read_end(directory: pathlib.Path, what: str) -> str:
  try:
    read_all(directory)
  except UserError:
    return "noticed"
  except Exception:
    print(f"{what}:\n{traceback.format_exc()}", file=sys.stderr)
    return "traceback"
  print(f"{what}: not noticed", file=sys.stderr)
  return "wrong"
