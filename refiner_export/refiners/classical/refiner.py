"""A visual refiner without a neural network: objects from the annotations, features from gradients and colours.

It needs no weights and no accelerator, so the whole system can be tried on any machine. It keeps the form of the neural
refiner: a fixed number of detector rows that cover the picture, objects first, and one mask feature per object.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from refiner_export.refiners.classical import descriptor
from refiner_export.refiners.base import Detections, Picture, RefinerSettings, Segments, Tags
from refiner_export.common.settings import require
from refiner_export.sources.base import SourceObject

_VERSION = 1  # to be raised whenever the same picture would give other features


@dataclasses.dataclass(unsafe_hash=True)
class ClassicalRefiner(RefinerSettings):
  """Descriptors of annotated objects and of a regular grid.

  Attributes:
    grid: cells along a side; the detector gives grid * grid rows, 900 by default as Grounding-DINO does.
  """
  grid: int = 30

  def check(self, path: str) -> None:
    require(1 <= self.grid <= 64, f"{path}.grid: expected 1 to 64 cells along a side, got {self.grid}")

  def describe(self) -> dict:
    return {"name": "classical", "version": _VERSION, "patch": descriptor.PATCH, **dataclasses.asdict(self)}

  def build(self) -> "ClassicalRefiner":
    """Itself: there is nothing to load."""
    return self

  @property
  def tagger(self) -> "AnnotationTagger":
    return AnnotationTagger()

  @property
  def detector(self) -> "GridDetector":
    return GridDetector(self.grid)

  @property
  def segmenter(self) -> "MaskDescriber":
    return MaskDescriber(self.grid)


class AnnotationTagger:
  """Tags are those of the annotations, each once, with score 1."""

  def tag(self, pictures: Sequence[Picture]) -> list[Tags]:
    names = [tuple(dict.fromkeys(thing.tag for thing in picture.objects)) for picture in pictures]
    return [Tags(found, np.ones(len(found), np.float32)) for found in names]


class GridDetector:
  """Objects are those annotations whose tag was found; rows are the objects, then the grid's cells, row by row.

  There are always `grid * grid` rows. Each object takes the row of the free cell nearest to its centre, so that what
  falls out is covered by the object instead.
  """

  def __init__(self, grid: int):
    self.grid, self.rows = grid, grid * grid
    corners = np.arange(grid) / grid
    y, x = np.meshgrid(corners, corners, indexing="ij")
    centres, sizes = [x + 0.5 / grid, y + 0.5 / grid], np.full((2, grid, grid), 1 / grid)
    self._cells = np.stack([*centres, *sizes], axis=-1).reshape(-1, 4)  # cxcywh

  def detect(self, pictures: Sequence[Picture], tags: Sequence[Tags]) -> list[Detections]:
    return [self._detect(picture, dict(zip(found.names, found.scores))) for picture, found in zip(pictures, tags)]

  def _detect(self, picture: Picture, score_of: dict[str, float]) -> Detections:
    objects = annotated(picture, score_of)[:self.rows]
    boxes = np.array([thing.box for thing in objects], np.float32).reshape(-1, 4)
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    free = self._free_cells(centres)
    canvas = descriptor.make_canvas(picture.image, self.grid)
    regions = [descriptor.cut_region(canvas, box) for box in boxes]
    return Detections(
        tags=tuple(thing.tag for thing in objects), boxes=boxes,
        scores=np.array([score_of[thing.tag] for thing in objects], np.float32),
        row_features=descriptor.describe([*regions, *descriptor.cut_grid(canvas)[free]]),
        row_boxes=np.concatenate([np.concatenate([centres, sizes], axis=1), self._cells[free]]).astype(np.float32))

  def _free_cells(self, centres: np.ndarray) -> np.ndarray:
    """bool (rows,): the cells that keep their row when objects with these centres, (K, 2), have taken theirs."""
    free = np.ones(self.rows, bool)
    for centre in centres:
      distance = np.square(self._cells[:, :2] - centre).sum(axis=1)
      free[np.argmin(np.where(free, distance, np.inf))] = False
    return free


class MaskDescriber:
  """The descriptor of each object with what lies outside its mask painted in the mask's mean colour.

  Detections must come from `GridDetector`, whose objects are the picture's annotations in the same order.
  """

  def __init__(self, grid: int):
    self.grid = grid

  def segment(self, pictures: Sequence[Picture], detections: Sequence[Detections]) -> list[Segments]:
    return [self._segment(picture, found) for picture, found in zip(pictures, detections)]

  def _segment(self, picture: Picture, found: Detections) -> Segments:
    canvas = descriptor.make_canvas(picture.image, self.grid)
    objects = annotated(picture, dict(zip(found.tags, found.scores)))
    regions = [_masked_region(canvas, box, thing.mask) for box, thing in zip(found.boxes, objects)]
    areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(axis=1)  # of the boxes: not every object has a mask
    return Segments(descriptor.describe(regions), np.ones(len(regions), np.float32), areas, ())


def annotated(picture: Picture, score_of: dict[str, float]) -> list[SourceObject]:
  """The picture's objects whose tag has a score, in descending score; equal scores keep the annotations' order."""
  return sorted((thing for thing in picture.objects if thing.tag in score_of), key=lambda thing: -score_of[thing.tag])


def _masked_region(canvas: Image.Image, box: np.ndarray, mask: Callable[[], np.ndarray] | None) -> np.ndarray:
  """uint8 (PATCH, PATCH, 3): the region with everything outside the mask in the mean colour of what lies inside."""
  patch = descriptor.cut_region(canvas, box)
  if mask is None:
    return patch
  inside = descriptor.cut_region(Image.fromarray(mask()).convert("L"), box) >= 128
  if inside.any():  # a mask thinner than a pixel of the patch says nothing
    patch = np.where(inside[..., None], patch, np.rint(patch[inside].mean(axis=0)).astype(np.uint8))
  return patch
