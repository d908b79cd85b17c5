"""The classical refiner with the faults that networks have: it misses objects, places boxes badly, and names wrongly.

The faults are put into the annotations that the classical refiner works from. So the features of a misplaced box are
those of the place where the box is.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from refiner_export.common.checks import at_least
from refiner_export.common.settings import require
from refiner_export.refiners.base import Detections, Segments, Tags, UprightPicture
from refiner_export.refiners.classical.refiner import (
    AnnotationTagger, ClassicalRefiner, GridDetector, MaskDescriber)
from refiner_export.sources.base import Corners, SourceObject

_VERSION = 1  # raise it whenever the same picture would get other faults


@dataclasses.dataclass(unsafe_hash=True)
class ImperfectRefiner(ClassicalRefiner):
  """Faults are drawn for each picture from the seed and from its pixels, so that they do not depend on the order.

  Attributes:
    missed: the probability that an object is not found.
    jitter: the standard deviation of each corner, as a share of the box's width and height.
    wrong_tags: the probability that a found object gets one of `names` instead of its own name.
    names: the names to draw wrong ones from.
    seed: another seed gives other faults.
  """
  missed: float = 0.0
  jitter: float = 0.0
  wrong_tags: float = 0.0
  names: tuple[str, ...] = ()
  seed: int = 0

  def check(self, path: str) -> None:
    super().check(path)
    for name in "missed", "wrong_tags":
      require(0 <= getattr(self, name) <= 1, f"{path}.{name}={getattr(self, name)} must lie in [0, 1]")
    require(self.jitter >= 0, f"{path}.jitter={self.jitter} must not be negative")
    require(not self.wrong_tags or len(set(self.names)) >= 2,
            f"{path}.names={self.names}: name at least two tags, from which wrong ones are drawn")
    at_least(self, path, 0, "seed")

  def describe(self) -> dict:
    return super().describe() | {"name": "imperfect", "faults": _VERSION, "names": list(self.names)}

  def build(self) -> "ImperfectRefiner":
    return self

  @property
  def tagger(self) -> "_WithFaults":
    return _WithFaults(self, AnnotationTagger())

  @property
  def detector(self) -> "_WithFaults":
    return _WithFaults(self, GridDetector(self.grid))

  @property
  def segmenter(self) -> "_WithFaults":
    return _WithFaults(self, MaskDescriber())

  def seen(self, picture: UprightPicture) -> UprightPicture:
    """The picture with the objects that the refiner takes for true."""
    rng = np.random.default_rng((self.seed, zlib.crc32(picture.image.tobytes())))
    objects = []
    for found in picture.objects:
      # Every object draws the same random numbers, so that one setting does not change what another one does.
      is_missed, is_wrong, choice = rng.random() < self.missed, rng.random() < self.wrong_tags, rng.random()
      shift = rng.standard_normal(4)
      if not is_missed:
        tag = self._other(found.tag, choice) if is_wrong else found.tag
        objects.append(SourceObject(tag, _moved(found.box, self.jitter * shift), found.mask))
    return UprightPicture(picture.image, tuple(objects))

  def _other(self, tag: str, choice: float) -> str:
    others = [name for name in self.names if name != tag]
    return others[int(choice * len(others))]


class _WithFaults:
  """A part of the classical refiner that sees the picture with faulty annotations."""

  def __init__(self, settings: ImperfectRefiner, part: AnnotationTagger | GridDetector | MaskDescriber):
    self._settings, self._part = settings, part

  @property
  def rows(self) -> int:
    return self._part.rows

  def tag(self, pictures: Sequence[UprightPicture]) -> list[Tags]:
    return self._part.tag(self._seen(pictures))

  def detect(self, pictures: Sequence[UprightPicture], tags: Sequence[Tags]) -> list[Detections]:
    return self._part.detect(self._seen(pictures), tags)

  def segment(self, pictures: Sequence[UprightPicture], detections: Sequence[Detections]) -> list[Segments]:
    return self._part.segment(self._seen(pictures), detections)

  def _seen(self, pictures: Sequence[UprightPicture]) -> list[UprightPicture]:
    return list(map(self._settings.seen, pictures))


def _moved(box: Corners, shift: np.ndarray) -> Corners:
  """The box with its corners shifted by shares of its sides, in the picture and with the corners in order."""
  left, top, right, bottom = box
  width, height = right - left, bottom - top
  moved = np.clip(np.array(box) + shift * (width, height, width, height), 0, 1)
  (x1, x2), (y1, y2) = sorted(moved[[0, 2]].tolist()), sorted(moved[[1, 3]].tolist())
  return x1, y1, x2, y2
