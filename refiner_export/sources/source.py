"""The base class of all sources. A source names its units at once, and reads a unit when its turn comes."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from refiner_export.common.settings import Settings, require
from refiner_export.sources.base import SourceExample, current_version


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
  """A part of a source that is read by itself: a tar, a part of a JSON file, a slice of a folder.

  Attributes:
    name: no other unit of the source has this name.
    count: how many examples the unit holds. None when only reading the unit tells: such a unit becomes one output
      shard, whatever its size.
    version: a text that changes when the unit is edited and that is known without reading the unit: the size of a
      large file in bytes, or the hash of a small file. An export that was begun refuses to go on with another version.
    parts: name and version of what the unit is made of, such as (("captions", "1f0c..."),), so that an edited part can
      be named.
  """
  name: str
  count: int | None = None
  version: str = ""
  parts: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(unsafe_hash=True)
class SourceSettings(Settings):
  """Settings that name the input files and read them. A source of a new format derives from this class.

  A source implements `shards` and `read`. Every process of an export makes the same plan out of `shards`, so both
  methods return the same on every call and on every machine.

  Attributes:
    name: the name of the data, which every record carries.
  """
  name: ClassVar[str] = ""

  def check(self, path: str) -> None:
    require(bool(self.name), f"{path}: class {type(self).__name__} has no name: write name = \"...\" into the class")

  def shards(self) -> Sequence[Unit]:
    """All units in their order, from names and sizes alone. This is fast for a billion examples too.

    Raises:
      UserError: an input file is missing or wrong.
    """
    raise NotImplementedError

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    """The examples of a unit, in the same order on every call. An id is unique in the whole source.

    Only texts and annotations are read here. The exporter calls `SourcePicture.read` later, from several threads and
    when the iterator is already further.

    Raises:
      UserError: a file of the unit is missing or wrong.
    """
    raise NotImplementedError

  def read_slice(self, unit: Unit, start: int = 0, stop: int | None = None) -> Iterator[SourceExample]:
    """Examples `start` to `stop` (exclusive) of a unit; `stop` None means up to the end.

    This implementation reads over the examples before `start`. A source with random access overrides the method.

    Raises:
      UserError: see `read`; or the unit goes on after its `count` examples.
    """
    examples = self.read(unit)
    yield from itertools.islice(examples, start, stop)
    if stop is not None and stop == unit.count:
      require(next(examples, None) is None,
              f"source: unit {unit.name} holds more than its count of {stop} examples: mend the source's method shards")

  def unmatched(self, unit: Unit) -> Mapping[str, int]:
    """How many annotations of a unit belong to no example, by reason; `SourceExample.dropped` has all others."""
    return {}

  def picture_versions(self, unit: Unit, start: int, stop: int | None) -> Iterator[tuple[str, Sequence[str]]]:
    """The id and the versions of the pictures of each example of a slice; "" for a picture that is not there now.

    A source that can say this without reading texts overrides the method.
    """
    for example in self.read_slice(unit, start, stop):
      yield example.id, [current_version(picture) for picture in example.pictures]

  def examples(self) -> Iterator[SourceExample]:
    """All examples, unit after unit."""
    for unit in self.shards():
      yield from self.read(unit)
