"""Grounding-DINO as the detector: boxes of the tags, and one row of features for each of its 900 queries.

The tags of a picture become one caption, or several captions when they exceed the 256 tokens of the text encoder. The
model runs once per caption. In one run, the score of a query for a tag is its highest score for a token of this tag.
The query gets the tag with the highest score. So a label is always a whole tag, never pieced together from tokens.
A query is an object when two conditions hold:

  - Its highest score for any token of the caption exceeds `box_threshold`, as in the original code.
  - Its score for its tag exceeds `text_threshold`. This score becomes the score of the object.

The objects of all captions of a picture go through non-maximum suppression together, separately for each tag. The rows
come from the first caption, which has the best tags. They are in descending order of the query's highest score for any
token.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from transformers import BertTokenizer

from refiner_export.common.boxes import to_xyxy
from refiner_export.common.settings import Settings, require
from refiner_export.common.weight_files import sha256
from refiner_export.refiners.base import Detections, Tags, UprightPicture
from refiner_export.refiners.compute import Compute, normalise
from refiner_export.refiners.grounding_dino.image import DetectorImage
from refiner_export.refiners.grounding_dino.model import load_official, load_pretrained
from refiner_export.refiners.grounding_dino.tag_caption import VOCABULARY_REMEDY, Caption, Captioner, load_tokenizer

_VERSION = 1  # raise it whenever the same picture would give other features
_REMEDY = ("Name the file groundingdino_swint_ogc.pth of the GroundingDINO project's release (IDEA-Research), or a "
           "directory in Hugging Face's form such as IDEA-Research/grounding-dino-tiny")
_SHARES = "box_threshold", "text_threshold", "max_iou"  # settings that lie in [0, 1]


@dataclasses.dataclass(unsafe_hash=True)
class GroundingDino(Settings):
  """Settings of Grounding-DINO-T, or of another size in Hugging Face's form.

  Attributes:
    checkpoint: the official .pth file, or a directory in Hugging Face's form.
    tokenizer: a directory with the vocabulary of bert-base-uncased. None when the checkpoint's directory has it.
    box_threshold: the highest score of an object for any token must exceed this.
    text_threshold: the score of an object for its tag must exceed this.
    max_iou: when two objects of one tag overlap by more than this, the object with the lower score is dropped.
    shortest: pixels of the shorter side of the model's input.
    longest: the most pixels of its longer side. The shorter side shrinks with it.
    batch: pictures of one size in one pass.
  """
  checkpoint: str
  tokenizer: str | None = None
  box_threshold: float = 0.25
  text_threshold: float = 0.2
  max_iou: float = 0.6
  shortest: int = 800
  longest: int = 1333
  batch: int = 8

  NAME: ClassVar[str] = "grounding_dino"  # in descriptions
  FILES: ClassVar[tuple[str, ...]] = ("checkpoint", "tokenizer")  # fields that name files

  def check(self, path: str) -> None:
    for name in _SHARES:
      require(0 <= getattr(self, name) <= 1, f"{path}.{name}: expected 0 to 1, got {getattr(self, name)}")
    require(32 <= self.shortest <= self.longest,
            f"{path}: expected 32 <= shortest <= longest pixels, got {self.shortest} and {self.longest}")
    require(self.batch >= 1, f"{path}.batch: expected at least 1, got {self.batch}")
    require(pathlib.Path(self.checkpoint).exists(), f"{path}.checkpoint: not found: {self.checkpoint}. {_REMEDY}")
    for file in self._checkpoint_files.values():
      require(file.is_file(), f"{path}.checkpoint: {file} is missing. {_REMEDY}")
    require(self._tokenizer_file.is_file(), f"{path}.tokenizer: {self._tokenizer_file} is missing. {VOCABULARY_REMEDY}")

  def build(self, compute: Compute) -> "GroundingDinoDetector":
    """Loads the model onto the device. Raises `UserError` when the checkpoint is not a whole Grounding-DINO."""
    checkpoint = pathlib.Path(self.checkpoint)
    model = load_pretrained(checkpoint) if checkpoint.is_dir() else load_official(checkpoint)
    tokenizer = load_tokenizer(self._tokenizer_file, model.config.text_config.vocab_size)
    return GroundingDinoDetector(model, tokenizer, self, compute)

  def describe(self) -> dict:
    """Everything that decides the detections. A file is described by its digest."""
    described = {"name": self.NAME, "version": _VERSION}
    for role, file in {**self._checkpoint_files, "tokenizer": self._tokenizer_file}.items():
      described[role] = sha256(file)
    for name in (*_SHARES, "shortest", "longest"):
      described[name] = getattr(self, name)
    return described

  @property
  def _checkpoint_files(self) -> dict[str, pathlib.Path]:
    path = pathlib.Path(self.checkpoint)
    if path.is_dir():
      return {"checkpoint": path / "model.safetensors", "config": path / "config.json"}
    return {"checkpoint": path}

  @property
  def _tokenizer_file(self) -> pathlib.Path:
    directory = pathlib.Path(self.tokenizer or self.checkpoint)
    whole, words = directory / "tokenizer.json", directory / "vocab.txt"
    return words if words.exists() and not whole.exists() else whole


class GroundingDinoDetector:
  """Finds tags in pictures; see `Detector`.

  Attributes:
    rows: number of queries of the model.
    prepare: makes the model's input from a picture, uint8 (H, W, 3). It does not refer to the model, so that it can be
      sent to other processes.
  """

  def __init__(self, model: torch.nn.Module, tokenizer: BertTokenizer, settings: GroundingDino, compute: Compute):
    """`model` has the `forward` of `GroundingDinoModel`, and `num_queries` and `max_text_len` in its `config`."""
    self.rows = model.config.num_queries
    self.prepare = DetectorImage(settings.shortest, settings.longest, self.rows)
    self.captioner = Captioner(tokenizer, model.config.max_text_len)
    self.settings, self.compute, self.model = settings, compute, compute.place(model)

  def detect(self, pictures: Sequence[UprightPicture], tags: Sequence[Tags]) -> list[Detections]:
    """The objects and rows of each picture. A picture without tags has rows and no objects."""
    return self.detect_prepared([self.prepare(picture.image) for picture in pictures], tags)

  @torch.inference_mode()
  def detect_prepared(self, prepared: Sequence[np.ndarray], tags: Sequence[Tags]) -> list[Detections]:
    """As `detect`, for the outputs of `prepare`."""
    inputs, captions, picture_of = [], [], []  # one entry per caption
    for index, found in enumerate(tags):
      for caption in self.captioner.captions(found.names):
        inputs.append(prepared[index])
        captions.append(caption)
        picture_of.append(index)
    found: list[Detections | None] = [None] * len(captions)
    for positions, pixels in self.compute.batches(inputs, self.settings.batch):
      detections = self._run(pixels, [captions[position] for position in positions])
      for position, detected in zip(positions, detections):
        found[position] = detected
    per_picture: list[list[Detections]] = [[] for _ in prepared]
    for index, detected in zip(picture_of, found):
      per_picture[index].append(detected)
    return [self._merge(detections) for detections in per_picture]

  def _run(self, pixels: torch.Tensor, captions: Sequence[Caption]) -> list[Detections]:
    """Runs the model once. Objects that overlap are all kept.

    Args:
      pixels: uint8 (B, H, W, 3).
      captions: B captions, one per picture.
    """
    ids, mask, owners = (tensor.to(pixels.device) for tensor in self.captioner.pad(captions))
    images = normalise(pixels)
    if self.compute.compile:  # torch traces a graph for one size in seconds, a graph for all sizes in minutes
      torch._dynamo.mark_static(images, 2)
      torch._dynamo.mark_static(images, 3)
    with self.compute.autocast():
      hidden, logits, boxes = self.model(images, ids, mask)
    scores, tags = best_per_tag(logits, owners).max(dim=2)
    token_scores, order = logits.amax(dim=2).sort(dim=1, descending=True, stable=True)
    arrays = []
    for tensor in (hidden, boxes, scores.sigmoid(), tags):
      ones = [1] * (tensor.dim() - 2)
      arrays.append(torch.take_along_dim(tensor, order.view(*order.shape, *ones), dim=1).cpu().numpy())
    arrays.append(token_scores.sigmoid().cpu().numpy())
    return [self._describe(caption, *rows) for caption, *rows in zip(captions, *arrays)]

  def _describe(
      self, caption: Caption, rows: np.ndarray, boxes: np.ndarray, scores: np.ndarray, tags: np.ndarray,
      token_scores: np.ndarray,
  ) -> Detections:
    """The detections of one caption. All arrays have one entry per query, in descending `token_scores`."""
    corners = np.clip(to_xyxy(boxes), 0, 1)
    chosen = (token_scores > self.settings.box_threshold) & (scores > self.settings.text_threshold)
    chosen &= (corners[:, 2:] > corners[:, :2]).all(axis=1)
    return Detections(tuple(caption.tags[tag] for tag in tags[chosen]), corners[chosen], scores[chosen], rows, boxes)

  def _merge(self, found: Sequence[Detections]) -> Detections:
    """One picture: the objects of all captions, each object once, and the rows of the first caption."""
    tags, classes = [], []
    numbers: dict[str, int] = {}  # a number for each tag
    for detections in found:
      for tag in detections.tags:
        tags.append(tag)
        classes.append(numbers.setdefault(tag, len(numbers)))
    boxes = np.concatenate([detections.boxes for detections in found])
    scores = np.concatenate([detections.scores for detections in found])
    kept = classwise_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.tensor(classes, dtype=torch.long),
                         self.settings.max_iou).numpy()
    return dataclasses.replace(found[0], tags=tuple(tags[k] for k in kept), boxes=boxes[kept], scores=scores[kept])


def best_per_tag(logits: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
  """The highest logit among the tokens of each tag.

  Args:
    logits: (B, N, T), query against token.
    owners: int64 (B, T), 0 for a token of no tag, otherwise 1 + the number of the tag.

  Returns:
    (B, N, T - 1): column k belongs to tag k. Columns beyond the last tag are -inf.
  """
  # T columns are enough for column 0 and all tags, because [CLS] and [SEP] are tokens of no tag.
  lowest = torch.full_like(logits, float("-inf"))
  return lowest.scatter_reduce(2, owners[:, None].expand_as(logits), logits, "amax")[:, :, 1:]


def classwise_nms(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, max_iou: float,
) -> torch.Tensor:
  """Non-maximum suppression: drops a box when a kept box of its class with a higher score overlaps it too much.

  Args:
    boxes: (K, 4) xyxy.
    scores: (K,). Of two equal scores the earlier one counts as the higher one.
    classes: (K,) integers.
    max_iou: the largest intersection over union of two boxes that are different objects.

  Returns:
    int64 positions of the kept boxes, in descending score.
  """
  order = scores.argsort(descending=True, stable=True)
  boxes, classes = boxes[order], classes[order]
  rivals = (_pairwise_iou(boxes) > max_iou) & (classes[:, None] == classes)
  kept = torch.ones_like(order, dtype=torch.bool)
  for rank in range(len(order)):
    if kept[rank]:
      kept[rank + 1:] &= ~rivals[rank, rank + 1:]
  return order[kept]


def _pairwise_iou(boxes: torch.Tensor) -> torch.Tensor:
  """(K, 4) xyxy -> (K, K), the intersection over union of every pair, in the precision of the boxes."""
  low = torch.maximum(boxes[:, None, :2], boxes[:, :2])
  high = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
  shared = (high - low).clamp(min=0).prod(dim=-1)
  areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)
  # The clamp keeps two boxes without area from dividing zero by zero.
  return shared / (areas[:, None] + areas - shared).clamp(min=torch.finfo(boxes.dtype).tiny)
