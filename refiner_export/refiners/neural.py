"""The refiner of the paper: RAM++ says what is in a picture, Grounding-DINO finds it, SAM-HQ masks it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from refiner_export.refiners.base import Detections, Picture, RefinerSettings, Segments, Tags
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.grounding_dino.detector import GroundingDino, GroundingDinoDetector
from refiner_export.refiners.originals.grounding_dino import OriginalGroundingDino
from refiner_export.refiners.originals.ram_plus import OriginalRamPlus
from refiner_export.refiners.originals.sam_hq import OriginalSamHQ
from refiner_export.refiners.ram_plus.tagger import RamPlus, RamPlusTagger
from refiner_export.refiners.sam_hq.segmenter import SamHQ, SamHQSegmenter
from refiner_export.common.settings import require

_VERSION = 1  # to be raised whenever the three together would give other features; each has a version of its own
_KINDS = {  # as each part calls itself when it is described
    "ram_plus": RamPlus, "original_ram_plus": OriginalRamPlus,
    "grounding_dino": GroundingDino, "original_grounding_dino": OriginalGroundingDino,
    "sam_hq": SamHQ, "original_sam_hq": OriginalSamHQ}
_FILES = {"tagger": ("checkpoint", "tag_list", "thresholds"), "detector": ("checkpoint", "tokenizer"),
          "segmenter": ("checkpoint",)}
_OPTIONAL = "detector.tokenizer"  # may lie in the directory of the checkpoint


@dataclasses.dataclass(unsafe_hash=True)
class NeuralRefiner(RefinerSettings):
  """Three networks, one after the other, on one device.

  Attributes:
    tagger, detector, segmenter: this project's, or the class of the same name in `refiners.original`, which runs the
      authors' package.
    compute: where and how all three run.
  """
  tagger: RamPlus
  detector: GroundingDino
  segmenter: SamHQ
  compute: Compute = dataclasses.field(default_factory=Compute)

  def describe(self) -> dict:
    """See `RefinerSettings`. The files, which are of gigabytes, are read once for each object."""
    return dict(self._description)

  @functools.cached_property
  def _description(self) -> dict:
    return {"name": "neural", "version": _VERSION, "precision": self.compute.precision,
            **{role: getattr(self, role).describe() for role in _FILES}}

  def build(self) -> "NeuralModels":
    return NeuralModels(*(getattr(self, role).build(self.compute) for role in _FILES))


class NeuralModels:
  """The networks on their device; see `Refiner`. Each has its own batches within the pictures that it is given."""

  def __init__(self, tagger: RamPlusTagger, detector: GroundingDinoDetector, segmenter: SamHQSegmenter):
    self.tagger, self.detector, self.segmenter = _Tagger(tagger), _Detector(detector), _Segmenter(segmenter)


class _Tagger:
  def __init__(self, network: RamPlusTagger):
    self.network = network

  def tag(self, pictures: Sequence[Picture]) -> list[Tags]:
    return self.network.tag_prepared(_prepare(self.network.prepare, pictures))


class _Detector:
  def __init__(self, network: GroundingDinoDetector):
    self.network, self.rows = network, network.rows

  def detect(self, pictures: Sequence[Picture], tags: Sequence[Tags]) -> list[Detections]:
    return self.network.detect_prepared(_prepare(self.network.prepare, pictures), tags)


class _Segmenter:
  def __init__(self, network: SamHQSegmenter):
    self.network = network

  def segment(self, pictures: Sequence[Picture], detections: Sequence[Detections]) -> list[Segments]:
    sizes = [picture.image.size for picture in pictures]
    return self.network.segment_prepared(_prepare(self.network.prepare, pictures), sizes, detections)


def _prepare(prepare: Callable[[Image.Image], np.ndarray], pictures: Sequence[Picture]) -> list[np.ndarray]:
  """A network's input of each picture, made by all cores at once: Pillow lets go of Python's lock."""
  with ThreadPoolExecutor() as pool:
    return list(pool.map(lambda picture: prepare(picture.image), pictures))


def from_description(described: dict, files: Mapping[str, str]) -> NeuralRefiner:
  """The settings that `NeuralRefiner.describe` described, checked and locked.

  Args:
    described: it holds the files' digests, but not where they lie.
    files: paths, by dotted field: `tagger.checkpoint`, `tagger.tag_list`, `tagger.thresholds`, `detector.checkpoint`,
      `detector.tokenizer` unless that is in the checkpoint's directory, and `segmenter.checkpoint`.

  Raises:
    UserError: a file is not named or does not exist; a part is not known to this program.
  """
  fields = [f"{role}.{name}" for role, names in _FILES.items() for name in names]
  missing = [field for field in fields if field not in files and field != _OPTIONAL]
  require(not missing, f"records were made by the neural refiner: name its files {', '.join(missing)}")
  unknown = files.keys() - set(fields)
  require(not unknown, f"{min(unknown, default='')}: the neural refiner has no such file (known: {', '.join(fields)})")
  parts = {role: _part(described[role], role, files) for role in _FILES}
  refiner = NeuralRefiner(**parts, compute=Compute(precision=described["precision"]))
  refiner.finalize("refiner")
  return refiner


def _part(described: dict, role: str, files: Mapping[str, str]) -> RamPlus | GroundingDino | SamHQ:
  kind = _KINDS.get(described["name"])
  require(kind is not None,
          f"records were made with {described['name']}, which this program does not have: export again")
  names = {field.name for field in dataclasses.fields(kind)} & described.keys() - set(_FILES[role])
  paths = {name: files[f"{role}.{name}"] for name in _FILES[role] if f"{role}.{name}" in files}
  return kind(**{name: described[name] for name in names}, **paths)
