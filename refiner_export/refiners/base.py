"""The interface of a visual refiner: a tagger, a detector and a segmenter, which all work on batches of pictures.

Nothing here needs torch, so that an export with the classical refiner needs none either.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from refiner_export.common.settings import Settings
from refiner_export.sources.base import SourceObject


@dataclasses.dataclass(frozen=True)
class UprightPicture:
  """A picture as refiners see it.

  Attributes:
    image: RGB, turned upright.
    objects: the annotations of the export source; empty for a picture that nobody annotated.
  """
  image: Image.Image
  objects: tuple[SourceObject, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tags:
  """What a picture shows, in descending score.

  Attributes:
    names: T lower-case tags.
    scores: float32 (T,) in [0, 1].
  """
  names: tuple[str, ...]
  scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Detections:
  """Where the tags are: K objects in descending score, and N rows of features for the whole picture.

  Attributes:
    tags: K tags, one per object.
    boxes: float32 (K, 4) xyxy in [0, 1].
    scores: float32 (K,) in [0, 1].
    row_features: float32 (N, 256).
    row_boxes: float32 (N, 4) cxcywh in [0, 1].
  """
  tags: tuple[str, ...]
  boxes: np.ndarray
  scores: np.ndarray
  row_features: np.ndarray
  row_boxes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Segments:
  """What lies under the mask of each of K objects, in the order of the detections.

  Attributes:
    features: float32 (K, 256).
    ious: float32 (K,), the segmenter's estimate of how well the mask fits; 1 for a given mask.
    areas: float32 (K,), the share of the picture that the mask covers, in [0, 1].
    rles: K masks in COCO's compressed run-length code, of the picture's size; empty when masks are not stored.
  """
  features: np.ndarray
  ious: np.ndarray
  areas: np.ndarray
  rles: tuple[bytes, ...]


class Tagger(Protocol):
  def tag(self, pictures: Sequence[UprightPicture]) -> list[Tags]:
    """Names what each picture shows."""


class Detector(Protocol):
  """`rows` is the number N of feature rows that every picture gets."""
  rows: int

  def detect(self, pictures: Sequence[UprightPicture], tags: Sequence[Tags]) -> list[Detections]:
    """Finds the tagged objects of each picture, and describes the whole picture in `rows` rows."""


class Segmenter(Protocol):
  def segment(self, pictures: Sequence[UprightPicture], detections: Sequence[Detections]) -> list[Segments]:
    """Makes a mask of each detected object, and describes what lies under it."""


class Refiner(Protocol):
  """The three parts, ready to run."""
  tagger: Tagger
  detector: Detector
  segmenter: Segmenter


class RefinerSettings(Settings):
  """Base of the settings of all refiners. Settings load no network: only `build` does.

  A user adds a refiner by writing a subclass with both methods.
  """

  def describe(self) -> dict:
    """Everything that decides the features, with the refiner's `name` and `version`. The fingerprint is its hash.

    The values are plain ones that JSON can hold.
    """
    raise NotImplementedError

  def build(self) -> Refiner:
    """Loads what the refiner needs. A process calls this once. Raises `UserError` for files that do not fit."""
    raise NotImplementedError
