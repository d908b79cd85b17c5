"""What the pipeline asks of a visual refiner: three parts, each of which takes a batch of pictures at once."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from refiner_export.common.settings import Settings
from refiner_export.sources.base import SourceObject


@dataclasses.dataclass(frozen=True)
class Picture:
  """An upright RGB picture; `objects` are its source's annotations, empty for a photo that nobody annotated."""
  image: Image.Image
  objects: tuple[SourceObject, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tags:
  """What is in a picture, best first: lower-case names and float32 (T,) scores in [0, 1]."""
  names: tuple[str, ...]
  scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Detections:
  """Where it is: K objects in descending score, and N rows of features for the whole picture; arrays are float32."""
  tags: tuple[str, ...]        # K
  boxes: np.ndarray            # (K, 4) xyxy in [0, 1]
  scores: np.ndarray           # (K,)
  row_features: np.ndarray     # (N, 256)
  row_boxes: np.ndarray        # (N, 4) cxcywh in [0, 1]


@dataclasses.dataclass(frozen=True)
class Segments:
  """What lies under the mask of each of K objects, in the order of the detections; arrays are float32."""
  features: np.ndarray         # (K, 256)
  ious: np.ndarray             # (K,) how well the segmenter believes its mask to fit; 1 for a given mask
  areas: np.ndarray            # (K,) share of the picture that the mask covers, in [0, 1]
  rles: tuple[bytes, ...]      # K masks as COCO's compressed run-length codes of the picture's size; or none kept


class Tagger(Protocol):
  def tag(self, pictures: Sequence[Picture]) -> list[Tags]:
    """Names what each picture shows."""


class Detector(Protocol):
  rows: int

  def detect(self, pictures: Sequence[Picture], tags: Sequence[Tags]) -> list[Detections]:
    """Finds the tagged objects of each picture, and gives `rows` feature rows that cover it."""


class Segmenter(Protocol):
  def segment(self, pictures: Sequence[Picture], detections: Sequence[Detections]) -> list[Segments]:
    """Masks the detected objects of each picture and describes what lies under each mask."""


class Refiner(Protocol):
  """The three parts, ready to run."""
  tagger: Tagger
  detector: Detector
  segmenter: Segmenter


class RefinerSettings(Settings):
  """Names a refiner and whatever decides its results. Reading a configuration loads no network: `build` does."""

  def describe(self) -> dict:
    """Everything that decides the features, with the refiner's name and version: what the fingerprint hashes."""
    raise NotImplementedError

  def build(self) -> Refiner:
    """Loads what the refiner needs: to be called once in a process. Raises `UserError` for files that do not fit."""
    raise NotImplementedError
