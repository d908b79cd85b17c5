"""Where the objects of a made-up scene are: objects are drawn one after the other, later ones lie over earlier ones."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from refiner_export.sources.base import Corners
from refiner_export.sources.scene_shapes import COLOURS, SHAPES, SIZES, TEXTURES, inside

MARGIN = 0.02  # between objects and the edge of the picture, as a share of its side

_TRIES = 40  # to find a place for an object
_SCENES = 1000  # to find a scene whose objects all have a place
_KINDS = (2, 5)  # how many shapes, and how many colours, a scene may have: objects of a scene are often alike


@dataclasses.dataclass(frozen=True)
class Thing:
  """An object of a scene.

  Attributes:
    shape, colour, texture, size: its words.
    x, y, radius: centre and half side, as shares of the picture's side.
    brightness: factor of its colour.
  """
  shape: str
  colour: str
  texture: str
  size: str
  x: float
  y: float
  radius: float
  brightness: float = 1.0

  def local(self, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The centres of all pixels of a picture, as coordinates in which the object fills [-1, 1] x [-1, 1]."""
    centres = (np.arange(side) + 0.5) / side
    x, y = (centres - self.x) / self.radius, (centres - self.y) / self.radius
    return np.broadcast_to(x, (side, side)), np.broadcast_to(y[:, None], (side, side))

  def whole_mask(self, side: int) -> np.ndarray:
    """bool (side, side): the object as if nothing lay over it."""
    return inside(self.shape, *self.local(side))


def held_out(colour: str, shape: str) -> bool:
  """Whether training scenes never show this combination. Every shape is held out in one colour, and vice versa."""
  return (list(COLOURS).index(colour) + 3 * SHAPES.index(shape)) % len(COLOURS) == 0


@dataclasses.dataclass(frozen=True)
class Rules:
  """What decides a layout.

  Attributes:
    objects: the least and the most number of objects.
    occlusion: the greatest share of an object that others may hide.
    new: whether held-out combinations appear; then the scene has at least one of them, else it has none.
  """
  objects: tuple[int, int]
  occlusion: float
  new: bool


def draw_layout(rng: np.random.Generator, rules: Rules, side: int) -> tuple[Thing, ...]:
  """The objects of a scene, from the lowest to the uppermost.

  Args:
    side: pixels of the picture's side; occlusion is measured in its pixels.
  """
  for _ in range(_SCENES):
    things = _try_layout(rng, rules, side)
    if things is not None:
      return things
  raise ValueError(f"no scene with {rules.objects} objects and an occlusion of {rules.occlusion} was found")


def visible_masks(things: Sequence[Thing], side: int) -> list[np.ndarray]:
  """bool (side, side) for each object: the pixels at which it is the uppermost object."""
  masks = []
  for thing in things:
    mask = thing.whole_mask(side)
    for below in masks:
      below &= ~mask
    masks.append(mask)
  return masks


def bounds(mask: np.ndarray) -> Corners:
  """xyxy in [0, 1]: the smallest box around the pixels of a mask that has at least one pixel."""
  height, width = mask.shape
  rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
  return (float(columns[0] / width), float(rows[0] / height),
          float((columns[-1] + 1) / width), float((rows[-1] + 1) / height))


def _try_layout(rng: np.random.Generator, rules: Rules, side: int) -> tuple[Thing, ...] | None:
  """None when an object found no place."""
  pairs = _pairs(rng, rules.new)
  count = int(rng.integers(rules.objects[0], rules.objects[1] + 1))
  things, masks, areas = [], [], []
  for number in range(count):
    allowed = pairs
    if rules.new and not number:
      allowed = list(filter(_is_new, pairs))
    colour, shape = allowed[rng.integers(len(allowed))]
    for _ in range(_TRIES):
      thing = _draw(rng, colour, shape)
      mask = thing.whole_mask(side)
      if _leaves_visible(masks, areas, mask, 1 - rules.occlusion):
        break
    else:
      return None
    for below in masks:
      below &= ~mask
    things.append(thing)
    masks.append(mask)
    areas.append(int(mask.sum()))
  return tuple(things)


def _pairs(rng: np.random.Generator, new: bool) -> list[tuple[str, str]]:
  """The colours and shapes that a scene may combine."""
  colours, shapes = _some(rng, list(COLOURS)), _some(rng, list(SHAPES))
  if new:
    shape = SHAPES[rng.integers(len(SHAPES))]
    for colour in COLOURS:
      if held_out(colour, shape):
        colours, shapes = {*colours, colour}, {*shapes, shape}
  pairs = []
  for colour in sorted(colours):
    for shape in sorted(shapes):
      if new or not held_out(colour, shape):
        pairs.append((colour, shape))
  return pairs


def _some(rng: np.random.Generator, words: list[str]) -> set[str]:
  count = rng.integers(_KINDS[0], _KINDS[1] + 1)
  return set(rng.choice(words, count, replace=False).tolist())


def _is_new(pair: tuple[str, str]) -> bool:
  return held_out(*pair)


def _draw(rng: np.random.Generator, colour: str, shape: str) -> Thing:
  size = list(SIZES)[rng.integers(len(SIZES))]
  texture = TEXTURES[rng.integers(len(TEXTURES))]
  radius = rng.uniform(*SIZES[size])
  least, most = radius + MARGIN, 1 - radius - MARGIN
  return Thing(shape, colour, texture, size, rng.uniform(least, most), rng.uniform(least, most), radius,
               rng.uniform(0.85, 1.0))


def _leaves_visible(masks: list[np.ndarray], areas: list[int], mask: np.ndarray, share: float) -> bool:
  """Whether every object stays visible to this share when `mask` is laid over all of them."""
  for below, area in zip(masks, areas):
    if (below & ~mask).sum() < share * area:
      return False
  return True
