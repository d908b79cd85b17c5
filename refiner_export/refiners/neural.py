"""The refiner of the paper: RAM++ names what is in a picture, Grounding-DINO finds it, SAM-HQ masks it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from refiner_export.common.settings import require
from refiner_export.refiners.base import Detections, RefinerSettings, Segments, Tags, UprightPicture
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.grounding_dino.detector import GroundingDino, GroundingDinoDetector
from refiner_export.refiners.originals.grounding_dino import OriginalGroundingDino
from refiner_export.refiners.originals.ram_plus import OriginalRamPlus
from refiner_export.refiners.originals.sam_hq import OriginalSamHQ
from refiner_export.refiners.ram_plus.tagger import RamPlus, RamPlusTagger
from refiner_export.refiners.sam_hq.segmenter import SamHQ, SamHQSegmenter

_VERSION = 1  # raise it when the three networks together would give other features; each network has its own version
_CLASSES = {"tagger": (RamPlus, OriginalRamPlus),  # by role
            "detector": (GroundingDino, OriginalGroundingDino),
            "segmenter": (SamHQ, OriginalSamHQ)}
_OPTIONAL = "detector.tokenizer"  # the checkpoint's directory may have it


@dataclasses.dataclass(unsafe_hash=True)
class NeuralRefiner(RefinerSettings):
  """Three networks, which run one after the other on one device.

  Attributes:
    tagger, detector, segmenter: this project's networks, or the classes of `refiners.originals`, which run the authors'
      packages.
    compute: where and how all three networks run.
  """
  tagger: RamPlus
  detector: GroundingDino
  segmenter: SamHQ
  compute: Compute = dataclasses.field(default_factory=Compute)

  def describe(self) -> dict:
    """See `RefinerSettings`. The files have gigabytes, so every object reads them only once."""
    return dict(self._description)

  @functools.cached_property
  def _description(self) -> dict:
    described = {"name": "neural", "version": _VERSION, "precision": self.compute.precision}
    for role in _CLASSES:
      described[role] = getattr(self, role).describe()
    return described

  def build(self) -> "NeuralModels":
    return NeuralModels(
        self.tagger.build(self.compute), self.detector.build(self.compute), self.segmenter.build(self.compute))


class NeuralModels:
  """The networks on their device; see `Refiner`. Each network makes batches of the size that its settings say."""

  def __init__(self, tagger: RamPlusTagger, detector: GroundingDinoDetector, segmenter: SamHQSegmenter):
    self.tagger, self.detector, self.segmenter = _Tagger(tagger), _Detector(detector), _Segmenter(segmenter)


class _Tagger:
  def __init__(self, network: RamPlusTagger):
    self.network = network

  def tag(self, pictures: Sequence[UprightPicture]) -> list[Tags]:
    return self.network.tag_prepared(_prepare(self.network.prepare, pictures))


class _Detector:
  def __init__(self, network: GroundingDinoDetector):
    self.network, self.rows = network, network.rows

  def detect(self, pictures: Sequence[UprightPicture], tags: Sequence[Tags]) -> list[Detections]:
    return self.network.detect_prepared(_prepare(self.network.prepare, pictures), tags)


class _Segmenter:
  def __init__(self, network: SamHQSegmenter):
    self.network = network

  def segment(self, pictures: Sequence[UprightPicture], detections: Sequence[Detections]) -> list[Segments]:
    sizes = [picture.image.size for picture in pictures]
    return self.network.segment_prepared(_prepare(self.network.prepare, pictures), sizes, detections)


def _prepare(prepare: Callable[[Image.Image], np.ndarray], pictures: Sequence[UprightPicture]) -> list[np.ndarray]:
  """The inputs of a network, made on all cores at once. Threads are enough, because Pillow releases Python's lock."""
  images = [picture.image for picture in pictures]
  with ThreadPoolExecutor() as pool:
    return list(pool.map(prepare, images))


def from_description(described: Mapping, files: Mapping[str, str]) -> NeuralRefiner:
  """The settings that `NeuralRefiner.describe` described, checked and locked.

  Args:
    described: has the digests of the files, but not their paths.
    files: paths by dotted field: `tagger.checkpoint`, `tagger.tag_list`, `tagger.thresholds`, `detector.checkpoint`,
      `segmenter.checkpoint`, and `detector.tokenizer` unless the checkpoint's directory has the tokenizer.

  Raises:
    UserError: a file is not named or does not exist, or this program does not have a part.
  """
  known, missing = [], []
  for role, kinds in _CLASSES.items():
    for name in kinds[0].FILES:
      field = f"{role}.{name}"
      known.append(field)
      if field not in files and field != _OPTIONAL:
        missing.append(field)
  require(not missing, f"records were made by the neural refiner: name its files {', '.join(missing)}")
  unknown = files.keys() - set(known)
  require(not unknown, f"{min(unknown, default='')}: the neural refiner has no such file (known: {', '.join(known)})")
  parts = {}
  for role in _CLASSES:
    parts[role] = _part(described[role], role, files)
  refiner = NeuralRefiner(**parts, compute=Compute(precision=described["precision"]))
  refiner.finalize("refiner")
  return refiner


def _part(described: Mapping, role: str, files: Mapping[str, str]) -> RamPlus | GroundingDino | SamHQ:
  """The settings of one network: the files from `files`, all other described fields from `described`."""
  by_name = {kind.NAME: kind for kind in _CLASSES[role]}
  require(described["name"] in by_name,
          f"records were made with {described['name']}, which this program does not have: export again")
  kind = by_name[described["name"]]
  values = {}
  for field in dataclasses.fields(kind):
    path = f"{role}.{field.name}"
    if path in files:
      values[field.name] = files[path]
    elif field.name in described and field.name not in kind.FILES:
      values[field.name] = described[field.name]
  return kind(**values)
