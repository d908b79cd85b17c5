"""Damaged pictures: each is read or refused in one line, twice in the same way, and what is read can be stored.

A picture that is cut short may be refused, or be the whole picture; what lies outside the pixels may be lost. Damage
inside the pixels of a file without checksums cannot be seen: such a file gives some picture of the size that it states.
"""

import collections
import dataclasses
import io
import json
import os
import pathlib
import random
import select
import struct
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from refiner_export.common import images
from refiner_export.export import pipeline
from refiner_export.export.config import ImageSettings
from refiner_export.sources.base import SourceExample, SourcePicture

FULL, SMALL = 10_000, 300
MAX_SIDE = 48
_PATIENCE = 30.0  # seconds that a picture may take
_SOME = struct.Struct(">I")


@dataclasses.dataclass(frozen=True)
class DamagedPicture:
  """A case: the file, what was done to it, and the file before."""
  name: str
  data: bytes
  whole: bytes


def damaged_pictures(seed: int, count: int) -> Iterator[DamagedPicture]:
  """The cases of a seed, always the same ones: every kind of file with every kind of damage, in turn."""
  files = _files()
  for number in range(count):
    draw = random.Random(seed * 1_000_003 + number)
    kind = list(files)[number % len(files)]
    damage = draw.choice(DAMAGES)
    whole = files[kind]
    yield DamagedPicture(f"{kind}, {damage.__name__}, case {number} of seed {seed}", damage(whole, draw), whole)


def _files() -> dict[str, bytes]:
  """One good file of each kind."""
  draw = np.random.default_rng(0)
  smooth = Image.fromarray(draw.integers(0, 256, (5, 7, 3), np.uint8)).resize((70, 50), Image.Resampling.BICUBIC)
  deep = Image.fromarray(draw.integers(0, 65536, (9, 7), np.uint16))
  turned = Image.Exif()
  turned[0x0112] = 6
  alpha = smooth.copy()
  alpha.putalpha(128)
  made = [("JPEG", smooth, {}), ("JPEG", smooth, {"progressive": True}), ("JPEG", smooth, {"exif": turned}),
          ("JPEG", smooth.convert("CMYK"), {}), ("JPEG", smooth.convert("L"), {}), ("PNG", smooth, {"exif": turned}),
          ("PNG", smooth.quantize(17), {}), ("PNG", alpha, {}), ("PNG", deep, {}), ("PNG", smooth.convert("1"), {}),
          ("TIFF", smooth, {"exif": turned}), ("TIFF", deep, {}), ("TIFF", smooth, {"compression": "tiff_lzw"}),
          ("TIFF", smooth, {"compression": "jpeg"}), ("WEBP", smooth, {}), ("WEBP", alpha, {"lossless": True}),
          ("GIF", smooth, {}), ("GIF", smooth, {"save_all": True, "append_images": [smooth.rotate(9)]}),
          ("BMP", smooth, {}), ("PPM", smooth, {}), ("PPM", deep, {})]
  if "AVIF" in images.FORMATS:
    made.append(("AVIF", smooth, {}))
  files = {}
  for number, (kind, image, options) in enumerate(made):
    file = io.BytesIO()
    image.save(file, kind, **options)
    files[f"{kind} {number}"] = file.getvalue()
  return files


# --- kinds of damage ---


def none(data: bytes, draw: random.Random) -> bytes:
  return data


def cut_short(data: bytes, draw: random.Random) -> bytes:
  return data[:draw.randrange(len(data))]


def cut_out(data: bytes, draw: random.Random) -> bytes:
  start = draw.randrange(len(data))
  return data[:start] + data[start + draw.choice([1, 2, 4, 50]):]


def flip_bits(data: bytes, draw: random.Random) -> bytes:
  changed = bytearray(data)
  for _ in range(draw.choice([1, 1, 2, 5, 50])):
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
  return bytes(changed)


def flip_header_bits(data: bytes, draw: random.Random) -> bytes:
  changed = bytearray(data)
  for _ in range(draw.choice([1, 2, 4])):
    changed[draw.randrange(min(80, len(changed)))] ^= 1 << draw.randrange(8)
  return bytes(changed)


def write_number(data: bytes, draw: random.Random) -> bytes:
  """A number of two or four bytes somewhere in front becomes one that breaks sizes and offsets."""
  number = draw.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data)])
  packed = number.to_bytes(4, draw.choice(["big", "little"]))
  packed = packed if draw.random() < 0.5 else packed[:2]
  start = draw.randrange(min(200, len(data)))
  return data[:start] + packed + data[start + len(packed):]


def zero(data: bytes, draw: random.Random) -> bytes:
  start, length = draw.randrange(len(data)), draw.randrange(1, 200)
  return data[:start] + bytes(len(data[start:start + length])) + data[start + length:]


def append(data: bytes, draw: random.Random) -> bytes:
  return data + draw.choice([b"\0" * 700, data, draw.randbytes(99), b"<html>"])


def repeat(data: bytes, draw: random.Random) -> bytes:
  start, length = draw.randrange(len(data)), draw.randrange(1, 99)
  return data[:start] + data[start:start + length] * draw.choice([2, 9]) + data[start + length:]


def exchange(data: bytes, draw: random.Random) -> bytes:
  """The beginning of one format, and the rest of another."""
  other = draw.choice(list(_files().values()))
  start = draw.randrange(1, 60)
  return data[:start] + other[start:]


def noise(data: bytes, draw: random.Random) -> bytes:
  return data[:draw.choice([0, 4, 12, 40])] + draw.randbytes(draw.choice([0, 10, 1000]))


def mend_checksums(data: bytes, draw: random.Random) -> bytes:
  """Flipped bits in a PNG whose checksums are right again, so that only the decoder can notice."""
  if not data.startswith(b"\x89PNG"):
    return flip_bits(data, draw)
  parts, start = [data[:8]], 8
  while start + 12 <= len(data):
    (length,) = _SOME.unpack_from(data, start)
    body = data[start + 4:start + 8 + length]
    if draw.random() < 0.4 and length:
      body = body[:4] + flip_bits(body[4:], draw)
    parts += [_SOME.pack(length), body, _SOME.pack(zlib.crc32(body))]
    start += 12 + length
  return b"".join(parts)


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    none, cut_short, cut_out, flip_bits, flip_header_bits, write_number, zero, append, repeat, exchange, noise,
    mend_checksums]


# --- what must hold ---


def read(data: bytes):
  example = SourceExample("photo", (SourcePicture(lambda: data),))
  return pipeline.read(example, ImageSettings(max_side=MAX_SIDE))


def run_case(case: DamagedPicture) -> str:
  """How a case ends. Prints a case that ends badly."""
  try:
    return _end_of(case)
  except AssertionError:
    end = "wrong"
  except Exception:
    end = "traceback"
  print(f"{end}: {case.name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
  return end


def _end_of(case: DamagedPicture) -> str:
  found, again = read(case.data), read(case.data)
  if isinstance(found, images.UnreadableImage):
    assert (again.reason, again.is_unread) == (found.reason, False) and found.id == "photo"
    assert found.reason and "\n" not in found.reason and " at 0x" not in found.reason, found.reason
    assert case.data != case.whole, f"a good file is refused: {found.reason}"
    return "skipped"
  (picture,), (twin,) = found, again
  assert picture.jpeg == twin.jpeg and picture.image.mode == "RGB"
  assert max(picture.image.size) <= MAX_SIDE and min(picture.image.size) >= 1
  with Image.open(io.BytesIO(picture.jpeg)) as stored:
    assert stored.format == "JPEG" and stored.size == picture.image.size
    stored.load()
  if case.whole.startswith(case.data):  # what is missing are later frames or the mark of the end
    (whole,) = read(case.whole)
    assert np.array_equal(np.asarray(picture.image), np.asarray(whole.image)), "half a picture counts as a whole one"
  return "read"


def run(count: int, seed: int, folder: pathlib.Path) -> collections.Counter:
  """Reads `count` damaged pictures, and says how many ended in which way. `folder` is not needed."""
  first, ends = 0, collections.Counter()
  while first < count:
    first = _run_child(seed, first, count, ends)
  return ends


def _run_child(seed: int, first: int, count: int, ends: collections.Counter) -> int:
  """Runs cases in a new process until one of them ends it. Returns the number of the next case."""
  child = subprocess.Popen([sys.executable, __file__, json.dumps([seed, first, count])], stdout=subprocess.PIPE,
                           bufsize=0)
  for number in range(first, count):
    ready, _, _ = select.select([child.stdout], [], [], _PATIENCE)
    end = child.stdout.readline().decode().strip() if ready else ""
    if not end:
      ends["crash" if ready else "hang"] += 1
      print(f"{'crash' if ready else 'hang'}: case {number} of seed {seed}", file=sys.stderr, flush=True)
      child.kill()
      child.wait()
      return number + 1
    ends[end] += 1
  child.wait()
  return count


def _serve(seed: int, first: int, count: int) -> None:
  # The decoders of TIFF write to stderr by themselves.
  sys.stderr = os.fdopen(os.dup(2), "w")
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  for number, case in enumerate(damaged_pictures(seed, count)):
    if number >= first:
      print(run_case(case), flush=True)


if __name__ == "__main__":
  _serve(*json.loads(sys.argv[1]))
