"""A made-up world with exact truth: pictures of coloured shapes, with objects, captions and questions.

Nobody has to download or annotate anything, and every box, mask and answer is exact. So an experiment can measure what
a model learns about pictures that it has not seen.
"""

import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from refiner_export.common.settings import require
from refiner_export.sources.base import SourceExample, SourceObject, SourcePicture, TextBoxes
from refiner_export.sources.photos import Photos
from refiner_export.sources.scene_layout import Rules, Thing, bounds, draw_layout, visible_masks
from refiner_export.sources.scene_shapes import COLOURS, pattern
from refiner_export.sources.scene_texts import captions, conversations
from refiner_export.sources.source import SourceSettings, Unit

SPLITS = ("train", "test", "held_out")

_UNIT = 1000  # scenes of a unit
_VERSION = 1  # raise it whenever a scene of the same number would look different
_LIGHTER = 0.45  # how far the second colour of a texture is from the first one towards white
_CONTRAST = 0.35  # of a photo as background: objects must stay the clearest things in the picture


@dataclasses.dataclass(unsafe_hash=True)
class Scenes(SourceSettings):
  """Scenes of 2 to 8 coloured shapes. Scene k depends on the settings and on k alone, and is made when it is read.

  Attributes:
    count: how many scenes there are.
    split: "train"; "test", other scenes of the same kind; or "held_out", other scenes of which every one shows at least
      one combination of colour and shape that no scene of "train" and "test" shows or asks for.
    seed: another seed gives other scenes. Splits of one seed have no scene in common.
    size: pixels of the picture's side.
    objects: the least and the most number of objects.
    occlusion: the greatest share of an object that other objects may hide.
    background: "plain" greys, or pieces of the photos that scikit-image and scikit-learn carry.
  """
  count: int = 1000
  split: Literal["train", "test", "held_out"] = "train"
  seed: int = 0
  size: int = 96
  objects: tuple[int, int] = (2, 8)
  occlusion: float = 0.2
  background: Literal["plain", "photos"] = "plain"

  name = "scenes"

  def check(self, path: str) -> None:
    super().check(path)
    require(self.count >= 1, f"{path}.count={self.count} must be at least 1")
    require(self.seed >= 0, f"{path}.seed={self.seed} must not be negative")
    require(self.size >= 32, f"{path}.size={self.size}: expected at least 32 pixels")
    least, most = self.objects
    require(2 <= least <= most <= 8, f"{path}.objects={self.objects} must be two ascending numbers from 2 to 8")
    require(0 <= self.occlusion < 1, f"{path}.occlusion={self.occlusion} must lie in [0, 1)")

  def shards(self) -> Sequence[Unit]:
    units = []
    for start in range(0, self.count, _UNIT):
      units.append(Unit(f"{self.split}-{start}", min(_UNIT, self.count - start), str(_VERSION)))
    return units

  def read(self, unit: Unit) -> Iterator[SourceExample]:
    return self.read_slice(unit)

  def read_slice(self, unit: Unit, start: int = 0, stop: int | None = None) -> Iterator[SourceExample]:
    first = int(unit.name.rpartition("-")[2])
    for number in range(*slice(start, stop).indices(unit.count)):
      yield self.example(first + number)

  def example(self, number: int) -> SourceExample:
    """Scene `number`, with exact objects and texts; the picture is painted when its bytes are read."""
    layout_rng, text_rng, paint_seed = self._streams(number)
    new = self.split == "held_out"
    things = draw_layout(layout_rng, Rules(self.objects, self.occlusion, new), self.size)
    objects = []
    for thing, mask in zip(things, visible_masks(things, self.size)):
      objects.append(SourceObject(thing.shape, bounds(mask), functools.partial(np.copy, mask)))
    boxes = TextBoxes()
    asked = conversations(things, objects, boxes, text_rng, new)
    picture = SourcePicture(functools.partial(self._paint, things, paint_seed), tuple(objects), boxes.collected())
    return SourceExample(f"{self.split}-{self.seed}-{number}", (picture,), captions(things), tuple(asked))

  def _streams(self, number: int) -> tuple[np.random.Generator, np.random.Generator, np.random.SeedSequence]:
    """Random numbers of the layout, of the texts and of the painting; no other scene or split has the same."""
    layout, texts, paint = np.random.SeedSequence((self.seed, SPLITS.index(self.split), number)).spawn(3)
    return np.random.default_rng(layout), np.random.default_rng(texts), paint

  def _paint(self, things: Sequence[Thing], seed: np.random.SeedSequence) -> bytes:
    """The picture as a PNG file."""
    rng = np.random.default_rng(seed)
    canvas = _grey(rng, self.size) if self.background == "plain" else _photo(rng, self.size)
    for thing in things:
      x, y = thing.local(self.size)
      colour = np.array(COLOURS[thing.colour]) * thing.brightness
      lighter = colour + _LIGHTER * (255 - colour)
      shades = np.where(pattern(thing.texture, x, y)[..., None], lighter, colour)
      canvas = np.where(thing.whole_mask(self.size)[..., None], shades, canvas)
    file = io.BytesIO()
    Image.fromarray(np.rint(canvas).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _grey(rng: np.random.Generator, size: int) -> np.ndarray:
  """A grey ground with a little noise, float64 (size, size, 3)."""
  level = rng.uniform(150, 225)
  return np.clip(level + rng.normal(0, 4, (size, size, 1)), 0, 255) * np.ones(3)


def _photo(rng: np.random.Generator, size: int) -> np.ndarray:
  """A random square of a random photo at a low contrast around a light grey, float64 (size, size, 3)."""
  photos = _photos()
  photo = photos[rng.integers(len(photos))]
  side = int(rng.uniform(0.4, 1.0) * min(photo.size))
  left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
  square = photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
  return 185 + _CONTRAST * (np.asarray(square, np.float64) - 128)


@functools.cache
def _photos() -> tuple[Image.Image, ...]:
  """The packaged photos, kept in memory: every scene takes a piece of one."""
  photos = []
  for example in Photos().examples():
    with Image.open(io.BytesIO(example.pictures[0].read())) as image:
      photos.append(image.convert("RGB"))
  return tuple(photos)
