"""A source of tiny pictures that are drawn when they are read. Worker processes can import it."""

import dataclasses
import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture, ask
from refiner_export.sources.source import SourceSettings, Unit


@dataclasses.dataclass(unsafe_hash=True)
class Tiny(SourceSettings):
  """`pictures` pictures of 16x16 with one object each. Every fifth, beginning with the third, is no picture."""
  pictures: int = 3

  name = "tiny"

  def shards(self) -> list[Unit]:
    return [Unit("all", self.pictures, "1")]

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    for number in range(self.pictures):
      thing = SourceObject("cat", (0.0, 0.0, 0.5, 0.5))
      picture = SourcePicture(functools.partial(_draw, number), (thing,), ((0.0, 0.0, 0.5, 0.5),))
      yield SourceExample(str(number), (picture,), (f"caption {number}",), (ask("rec", "the cat", "<box 0.0>"),))


def _draw(number: int) -> bytes:
  if number % 5 == 2:
    return b"no picture"
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)).save(file, "PNG")
  return file.getvalue()
