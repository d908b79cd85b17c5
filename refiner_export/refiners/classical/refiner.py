"""A visual refiner without a neural network: objects come from annotations, features from gradients and colours.

It needs no weights and no accelerator, so the whole system can be tried on any machine. Its outputs have the form of
the neural refiner's: a fixed number of detector rows that cover the picture, objects first, and one mask feature per
object.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from refiner_export.common import boxes as box_math
from refiner_export.common.settings import require
from refiner_export.refiners.base import Detections, RefinerSettings, Segments, Tags, UprightPicture
from refiner_export.refiners.classical import descriptor
from refiner_export.sources.base import SourceObject

_VERSION = 1  # raise it whenever the same picture would give other features


@dataclasses.dataclass(unsafe_hash=True)
class ClassicalRefiner(RefinerSettings):
  """Descriptors of annotated objects and of a regular grid.

  Attributes:
    grid: cells along a side. The detector gives grid * grid rows; the default gives 900, as Grounding-DINO does.
  """
  grid: int = 30

  def check(self, path: str) -> None:
    require(1 <= self.grid <= 64, f"{path}.grid: expected 1 to 64 cells along a side, got {self.grid}")

  def describe(self) -> dict:
    return {"name": "classical", "version": _VERSION, "patch": descriptor.PATCH, **dataclasses.asdict(self)}

  def build(self) -> "ClassicalRefiner":
    """Returns itself, because there is nothing to load."""
    return self

  @property
  def tagger(self) -> "AnnotationTagger":
    return AnnotationTagger()

  @property
  def detector(self) -> "GridDetector":
    return GridDetector(self.grid)

  @property
  def segmenter(self) -> "MaskDescriber":
    return MaskDescriber()


class AnnotationTagger:
  """Gives the tags of the annotations, every tag once, with score 1."""

  def tag(self, pictures: Sequence[UprightPicture]) -> list[Tags]:
    tags = []
    for picture in pictures:
      names = tuple(dict.fromkeys(annotation.tag for annotation in picture.objects))
      tags.append(Tags(names, np.ones(len(names), np.float32)))
    return tags


@dataclasses.dataclass(frozen=True)
class GridDetections(Detections):
  """What `GridDetector` finds. `regions` are the patches of the objects, so that nobody has to cut them again."""
  regions: tuple[np.ndarray, ...]


class GridDetector:
  """Gives `grid * grid` rows per picture: first the objects, then the cells of the grid, row by row.

  The objects are the annotations whose tag was found. Each object takes the row of the free cell nearest to its
  centre, so that the object covers the place of the cell that has no row.
  """

  def __init__(self, grid: int):
    self.grid, self.rows = grid, grid * grid
    corners = np.arange(grid) / grid
    y, x = np.meshgrid(corners, corners, indexing="ij")
    centres, sizes = [x + 0.5 / grid, y + 0.5 / grid], np.full((2, grid, grid), 1 / grid)
    self._cells = np.stack([*centres, *sizes], axis=-1).reshape(-1, 4)  # cxcywh

  def detect(self, pictures: Sequence[UprightPicture], tags: Sequence[Tags]) -> list[Detections]:
    detections = []
    for picture, found in zip(pictures, tags):
      detections.append(self._detect(picture, dict(zip(found.names, found.scores))))
    return detections

  def _detect(self, picture: UprightPicture, score_of: Mapping[str, float]) -> Detections:
    objects = annotated(picture, score_of)[:self.rows]
    boxes = np.array([found.box for found in objects], np.float32).reshape(-1, 4)
    row_boxes = box_math.to_cxcywh(boxes)
    free = self._free_cells(row_boxes[:, :2])
    canvas = descriptor.make_canvas(picture.image, self.grid)
    regions = []
    for box in boxes:
      regions.append(descriptor.cut_region(canvas, box))
    cells = descriptor.cut_grid(canvas)[free]
    patches = np.concatenate([regions, cells]) if regions else cells
    tags = tuple(found.tag for found in objects)
    return GridDetections(
        regions=tuple(regions),
        tags=tags, boxes=boxes, scores=np.array([score_of[tag] for tag in tags], np.float32),
        row_features=descriptor.describe(patches),
        row_boxes=np.concatenate([row_boxes, self._cells[free]]).astype(np.float32))

  def _free_cells(self, centres: np.ndarray) -> np.ndarray:
    """The cells that keep their row after objects have taken theirs.

    Args:
      centres: (K, 2), of the objects.

    Returns:
      bool (rows,).
    """
    free = np.ones(self.rows, bool)
    for centre in centres:
      distance = np.square(self._cells[:, :2] - centre).sum(axis=1)
      free[np.argmin(np.where(free, distance, np.inf))] = False
    return free


class MaskDescriber:
  """Gives the descriptor of each object, after all pixels outside the mask got the mean colour of the mask.

  The detections must come from `GridDetector`, which keeps the order of the annotations.
  """

  def segment(self, pictures: Sequence[UprightPicture], detections: Sequence[GridDetections]) -> list[Segments]:
    segments = []
    for picture, found in zip(pictures, detections):
      segments.append(self._segment(picture, found))
    return segments

  def _segment(self, picture: UprightPicture, found: GridDetections) -> Segments:
    objects = annotated(picture, dict(zip(found.tags, found.scores)))
    regions = []
    for box, region, annotation in zip(found.boxes, found.regions, objects):
      regions.append(_masked_region(region, box, annotation.mask))
    areas = box_math.area(found.boxes)  # areas of boxes, because some objects have no mask
    return Segments(descriptor.describe(regions), np.ones(len(regions), np.float32), areas, ())


def annotated(picture: UprightPicture, score_of: Mapping[str, float]) -> list[SourceObject]:
  """The objects of a picture whose tag has a score, in descending score. Equal scores keep the annotations' order."""
  scored = [found for found in picture.objects if found.tag in score_of]
  return sorted(scored, key=lambda found: -score_of[found.tag])


def _masked_region(patch: np.ndarray, box: np.ndarray, mask: Callable[[], np.ndarray] | None) -> np.ndarray:
  """The region `patch` of a box, with the mean colour of the mask in all pixels outside the mask.

  Returns:
    uint8 (PATCH, PATCH, 3). The plain region when there is no mask, or when the mask is thinner than a pixel.
  """
  if mask is None:
    return patch
  inside = descriptor.cut_region(Image.fromarray(mask()).convert("L"), box) >= 128
  if not inside.any():
    return patch
  colour = np.rint(patch[inside].mean(axis=0)).astype(np.uint8)
  return np.where(inside[..., None], patch, colour)
