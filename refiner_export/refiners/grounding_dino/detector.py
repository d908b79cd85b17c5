"""Grounding-DINO as the detector: boxes of the tags, and a row of features for each of its 900 queries.

A picture's tags become one caption, or several where they exceed the text encoder's 256 tokens; each caption is one
pass of the model. In a pass, a query's score for a tag is the highest of its scores for the tag's tokens, and the tag
with the highest of these is the query's tag: labels are never pieced together from tokens. A query is an object when

  - its highest score for any token of the caption is over `box_threshold`, as in the original code, and
  - its score for its tag, which becomes the object's score, is over `text_threshold`.

Objects of all passes together go through non-maximum suppression within each tag. Rows come from the first caption,
that of the best tags, and are in descending order of the query's highest score for any token.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import BertTokenizer

from refiner_export.refiners.base import Detections, Picture, Tags
from refiner_export.refiners.checkpoints import sha256
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.grounding_dino.image import DetectorImage
from refiner_export.refiners.grounding_dino.model import load_official, load_pretrained
from refiner_export.refiners.grounding_dino.nms import classwise_nms
from refiner_export.refiners.grounding_dino.tag_caption import VOCABULARY_REMEDY, Caption, Captioner, load_tokenizer
from refiner_export.common.settings import Settings, require

_VERSION = 1  # to be raised whenever the same picture would give other features
_REMEDY = ("Name the file groundingdino_swint_ogc.pth of the GroundingDINO project's release (IDEA-Research), or a "
           "directory in Hugging Face's form such as IDEA-Research/grounding-dino-tiny")
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB in 0 to 255


@dataclasses.dataclass(unsafe_hash=True)
class GroundingDino(Settings):
  """Grounding-DINO-T, or another size in Hugging Face's form.

  Attributes:
    checkpoint: the official .pth file, or a directory in Hugging Face's form.
    tokenizer: a directory with the vocabulary of bert-base-uncased; None when that is in the checkpoint's directory.
    box_threshold: what an object's highest score for any token must exceed.
    text_threshold: what an object's score for its tag must exceed.
    max_iou: of two objects of one tag that overlap by more than this, the worse is dropped.
    shortest: the shorter side in pixels of what the model sees,
    longest: as long as the longer side does not exceed this.
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

  def check(self, path: str) -> None:
    for name in ("box_threshold", "text_threshold", "max_iou"):
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
    """What decides the result; digests are those of the files."""
    files = {**self._checkpoint_files, "tokenizer": self._tokenizer_file}
    deciding = "box_threshold", "text_threshold", "max_iou", "shortest", "longest"
    return {"name": "grounding_dino", "version": _VERSION, **{role: sha256(file) for role, file in files.items()},
            **{name: getattr(self, name) for name in deciding}}

  @property
  def _checkpoint_files(self) -> dict[str, pathlib.Path]:
    path = pathlib.Path(self.checkpoint)
    if path.is_dir():
      return {"checkpoint": path / "model.safetensors", "config": path / "config.json"}
    return {"checkpoint": path}

  @property
  def _tokenizer_file(self) -> pathlib.Path:
    directory = pathlib.Path(self.tokenizer or self.checkpoint)
    files = directory / "tokenizer.json", directory / "vocab.txt"
    return files[1] if files[1].exists() and not files[0].exists() else files[0]


class GroundingDinoDetector:
  """Finds tags in pictures; see `Detector`.

  Attributes:
    rows: how many queries the model has.
    prepare: makes the model's input of a picture, uint8 (H, W, 3). It holds nothing of the model and can be sent to
      other processes.
  """

  def __init__(self, model: torch.nn.Module, tokenizer: BertTokenizer, settings: GroundingDino, compute: Compute):
    """`model` has the `forward` of `GroundingDinoModel`, and `num_queries` and `max_text_len` in its `config`."""
    self.rows = model.config.num_queries
    self.prepare = DetectorImage(settings.shortest, settings.longest, self.rows)
    self.captioner = Captioner(tokenizer, model.config.max_text_len)
    self.settings, self.compute, self.model = settings, compute, compute.place(model)

  def detect(self, pictures: Sequence[Picture], tags: Sequence[Tags]) -> list[Detections]:
    """The objects and rows of each picture. A picture without tags has rows and no objects."""
    return self.detect_prepared([self.prepare(picture.image) for picture in pictures], tags)

  @torch.inference_mode()
  def detect_prepared(self, prepared: Sequence[np.ndarray], tags: Sequence[Tags]) -> list[Detections]:
    """As `detect`, of pictures that `prepare` has been over."""
    captions = [self.captioner.captions(found.names) for found in tags]
    passes = [(index, caption) for index, of_picture in enumerate(captions) for caption in of_picture]
    found: list[Detections | None] = [None] * len(passes)
    for positions, pixels in self.compute.batches([prepared[index] for index, _ in passes], self.settings.batch):
      for position, detections in zip(positions, self._run(pixels, [passes[position][1] for position in positions])):
        found[position] = detections
    remaining = iter(found)
    return [self._merge([next(remaining) for _ in of_picture]) for of_picture in captions]

  def _run(self, pixels: torch.Tensor, captions: Sequence[Caption]) -> list[Detections]:
    """One pass over uint8 (B, H, W, 3) with a caption each; of objects that overlap none is dropped yet."""
    ids, mask, owners = (tensor.to(pixels.device) for tensor in self.captioner.pad(captions))
    colour = lambda values: torch.tensor(values, device=pixels.device)
    normalised = ((pixels - colour(_MEAN)) / colour(_STD)).permute(0, 3, 1, 2)
    if self.compute.compile:  # a graph per size is traced in seconds, one for all sizes in minutes
      torch._dynamo.mark_static(normalised, 2)
      torch._dynamo.mark_static(normalised, 3)
    with self.compute.autocast():
      hidden, logits, boxes = self.model(normalised, ids, mask)
    scores, tags = best_per_tag(logits, owners).max(dim=2)
    token_scores, order = logits.amax(dim=2).sort(dim=1, descending=True, stable=True)
    ordered = [torch.take_along_dim(tensor, order.view(*order.shape, *[1] * (tensor.dim() - 2)), dim=1)
               for tensor in (hidden, boxes, scores.sigmoid(), tags)]
    arrays = [tensor.cpu().numpy() for tensor in (*ordered, token_scores.sigmoid())]
    return [self._describe(caption, *of_picture) for caption, *of_picture in zip(captions, *arrays)]

  def _describe(
      self, caption: Caption, rows: np.ndarray, boxes: np.ndarray, scores: np.ndarray, tags: np.ndarray,
      token_scores: np.ndarray,
  ) -> Detections:
    """One picture of a pass, its queries in descending `token_scores`."""
    corners = np.clip(np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1), 0, 1)
    chosen = (token_scores > self.settings.box_threshold) & (scores > self.settings.text_threshold)
    chosen &= (corners[:, 2:] > corners[:, :2]).all(axis=1)
    return Detections(tuple(caption.tags[tag] for tag in tags[chosen]), corners[chosen], scores[chosen], rows, boxes)

  def _merge(self, passes: Sequence[Detections]) -> Detections:
    """One picture's objects of all passes, each object once, with the rows of the first pass."""
    tags = [tag for found in passes for tag in found.tags]
    boxes, scores = (np.concatenate([getattr(found, name) for found in passes]) for name in ("boxes", "scores"))
    numbers = {tag: number for number, tag in enumerate(dict.fromkeys(tags))}
    classes = torch.tensor([numbers[tag] for tag in tags], dtype=torch.long)
    kept = classwise_nms(torch.from_numpy(boxes), torch.from_numpy(scores), classes, self.settings.max_iou).numpy()
    return dataclasses.replace(passes[0], tags=tuple(tags[k] for k in kept), boxes=boxes[kept], scores=scores[kept])


def best_per_tag(logits: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
  """The highest logit among each tag's tokens.

  Args:
    logits: (B, N, T), query against token.
    owners: int64 (B, T), 0 for a token of no tag, else 1 + which tag it belongs to.

  Returns:
    (B, N, T - 1), of which as many columns count as there are tags; -inf elsewhere.
  """
  lowest = torch.full_like(logits, float("-inf"))  # as wide as the caption: [CLS] and [SEP] are more than one spare
  return lowest.scatter_reduce(2, owners[:, None].expand_as(logits), logits, "amax")[:, :, 1:]
