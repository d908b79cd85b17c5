"""Sources of tests, in a module that worker processes can import."""

import dataclasses
import functools
import io
import json
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image

from refiner_export.sources.base import SourceExample, SourcePicture
from refiner_export.sources.source import SourceSettings, Unit

EXAMPLES, UNITS = 10**9, 10**5


def png(seed: int) -> bytes:
  """A picture of 12x8."""
  pixels = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


@dataclasses.dataclass(unsafe_hash=True)
class Lines(SourceSettings):
  """A folder of JSON-lines files, one unit each: {"caption": ..., "pictures": [seed or text that is no picture, ...]}.

  Attributes:
    known: whether units say how many examples they hold.
  """
  folder: str
  known: bool = False

  name = "lines"

  def shards(self) -> list[Unit]:
    units = []
    for file in sorted(epath.Path(self.folder).glob("*.jsonl")):
      count = len(file.read_text().splitlines()) if self.known else None
      units.append(Unit(file.name, count, f"{file.stat().length} bytes"))
    return units

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    for position, line in enumerate((epath.Path(self.folder) / unit.name).read_text().splitlines()):
      fields = json.loads(line)
      pictures = []
      for seed in fields["pictures"]:
        pictures.append(SourcePicture(str(seed).encode if isinstance(seed, str) else functools.partial(png, seed)))
      yield SourceExample(f"{unit.name}/{position}", tuple(pictures), (fields["caption"],))


@dataclasses.dataclass(unsafe_hash=True)
class Billion(SourceSettings):
  """10^9 made-up pictures in 10^5 units."""
  name = "billion"

  def shards(self) -> Sequence[Unit]:
    return [Unit(f"{number:05d}.tar", EXAMPLES // UNITS, "1 GB") for number in range(UNITS)]

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    for position in range(unit.count):
      yield SourceExample(f"{unit.name}/{position}", (SourcePicture(functools.partial(png, position)),), ("a caption",))


@dataclasses.dataclass(unsafe_hash=True)
class WrongCount(SourceSettings):
  """One unit of three examples that says it has another number of them."""
  count: int = 3

  name = "wrong"

  def shards(self) -> list[Unit]:
    return [Unit("unit", self.count)]

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    for position in range(3):
      yield SourceExample(str(position), captions=("a caption",))


@dataclasses.dataclass(unsafe_hash=True)
class Twins(SourceSettings):
  """Two units of the same name."""
  name = "twins"

  def shards(self) -> list[Unit]:
    return [Unit("unit", 1), Unit("unit", 1)]
