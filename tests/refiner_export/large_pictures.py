"""python large_pictures.py THREADS BUDGET_MB [LIMIT_MB]: exports pictures of 100 megapixels under a limit of memory.

Prints the ids that became records, and how many MB more the process held at most than before. A limit is for the
address space, above what is mapped when the export begins.
"""

import dataclasses
import functools
import resource
import struct
import sys
import tempfile
import zlib

from refiner_export.common.command import fail
from refiner_export.common.settings import UserError
from refiner_export.export.config import ExportConfig, ReadingSettings, RunnerSettings
from refiner_export.export.run import export
from refiner_export.records.reader import RecordDirectory
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.sources.base import SourceExample, SourcePicture
from refiner_export.sources.source import SourceSettings, Unit

SIDE, PICTURES = 9_900, 5


@functools.cache
def black_png(side: int) -> bytes:
  """A small file of many pixels, with 8 bits of red, green and blue."""
  packer, rows = zlib.compressobj(1), b"\0" + bytes(3 * side)
  packed = []
  for _ in range(side):
    packed.append(packer.compress(rows))
  parts = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT": b"".join([*packed, packer.flush()]),
           b"IEND": b""}
  data = b"\x89PNG\r\n\x1a\n"
  for name, content in parts.items():
    data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
  return data


@dataclasses.dataclass(unsafe_hash=True)
class Large(SourceSettings):
  name = "large"

  def shards(self):
    return [Unit("all", PICTURES)]

  def read(self, unit):
    for k in range(PICTURES):
      yield SourceExample(str(k), (SourcePicture(functools.partial(black_png, SIDE)),), ("a caption",))


def held(field: str) -> int:
  """MB, as the system says: VmHWM is the most that was held, VmRSS what is held, VmSize what is mapped."""
  for line in open("/proc/self/status"):
    if line.startswith(field):
      return int(line.split()[1]) >> 10
  raise ValueError(field)


def main(threads: int, budget: int, limit: int | None = None) -> None:
  black_png(SIDE)
  runner = RunnerSettings(threads=threads, reading=ReadingSettings(megabytes=budget))
  with tempfile.TemporaryDirectory() as folder:
    config = ExportConfig(f"{folder}/out", Large(), ClassicalRefiner(grid=2), runner=runner)
    config.finalize()
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")  # forgets the most that was held so far
    before = held("VmRSS")
    if limit:
      size = (held("VmSize") + limit) << 20
      resource.setrlimit(resource.RLIMIT_AS, (size, size))
    export(config)
    more, directory = held("VmHWM") - before, RecordDirectory(config.output)
    print("records", *(directory[k].id for k in range(len(directory))), "MB", more)


if __name__ == "__main__":
  try:
    main(*map(int, sys.argv[1:]))
  except UserError as error:
    fail(error)
