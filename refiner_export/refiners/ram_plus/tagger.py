"""RAM++ as the tagger: a picture has the tags of a list whose score exceeds the threshold of the tag."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from refiner_export.common.settings import Settings, UserError, existing_path, require
from refiner_export.common.weight_files import load_state_dict, sha256
from refiner_export.refiners.base import Tags, UprightPicture
from refiner_export.refiners.checkpoints import fill
from refiner_export.refiners.compute import Compute, normalise
from refiner_export.refiners.ram_plus.model import RAM_PLUS_SWIN_B, RAM_PLUS_SWIN_L, RamPlusModel

_VERSION = 1  # raise it whenever the same picture would give other tags
_CONFIGS = {"swin_l": RAM_PLUS_SWIN_L, "swin_b": RAM_PLUS_SWIN_B}
_REMEDIES = {"checkpoint": "Name the file ram_plus_swin_large_14m.pth of the recognize-anything project's release",
             "tag_list": "Name the file ram_tag_list.txt of the recognize-anything project",
             "thresholds": "Name the file ram_tag_list_threshold.txt of the recognize-anything project"}
# Tables in official files, which the model computes.
_TABLES = ".relative_position_index", ".attn_mask"


@dataclasses.dataclass(unsafe_hash=True)
class RamPlus(Settings):
  """Settings of RAM++.

  Attributes:
    checkpoint: the official .pth file, or its weights as .safetensors.
    tag_list: a text file with one tag per line, in the order of the checkpoint's embeddings.
    thresholds: a text file with one number per line, in the order of the tags. A picture has a tag when the score
      exceeds the threshold, so a threshold of 1 forbids the tag.
    backbone: size of the image encoder in the checkpoint. The published checkpoint has a Swin-L.
    batch: pictures in one pass. A picture takes about 200 MB.
  """
  checkpoint: str
  tag_list: str
  thresholds: str
  backbone: Literal["swin_l", "swin_b"] = "swin_l"
  batch: int = 16

  NAME: ClassVar[str] = "ram_plus"  # in descriptions
  FILES: ClassVar[tuple[str, ...]] = ("checkpoint", "tag_list", "thresholds")  # fields that name files

  def check(self, path: str) -> None:
    require(self.batch >= 1, f"{path}.batch: expected at least 1, got {self.batch}")
    for field in self.FILES:
      file = existing_path(getattr(self, field), f"{path}.{field}", _REMEDIES[field])
      require(not file.is_dir(), f"{path}.{field}: {file} is a directory. {_REMEDIES[field]}")
    read_vocabulary(self.tag_list, self.thresholds)

  def build(self, compute: Compute) -> "RamPlusTagger":
    """Loads the model onto the device. Raises `UserError` when the files do not belong to one whole RAM++."""
    names, thresholds = read_vocabulary(self.tag_list, self.thresholds)
    model = load(self.checkpoint, self.backbone)
    require(model.config.tags == len(names),
            f"{self.tag_list} has {len(names)} tags, {self.checkpoint} has embeddings of {model.config.tags}: "
            "name the list that the checkpoint was made with")
    return RamPlusTagger(model, names, thresholds, self.batch, compute)

  def describe(self) -> dict:
    """Everything that decides the tags. A file is described by its digest."""
    described = {"name": self.NAME, "version": _VERSION}
    for field in self.FILES:
      described[field] = sha256(getattr(self, field))
    return described | {"backbone": self.backbone, "image_size": _CONFIGS[self.backbone].swin.image_size}


@dataclasses.dataclass(frozen=True)
class TaggerImage:
  """Resizes pictures to a square of `side` pixels. The aspect is not kept, as in the training of RAM++."""
  side: int

  def __call__(self, image: Image.Image) -> np.ndarray:
    """An RGB picture -> uint8 (side, side, 3)."""
    return np.asarray(image.resize((self.side, self.side), Image.Resampling.BILINEAR))


class RamPlusTagger:
  """Tags pictures; see `Tagger`.

  Attributes:
    prepare: makes the model's input from a picture. It does not refer to the model, so that it can be sent to other
      processes.
  """

  def __init__(
      self, model: RamPlusModel, names: Sequence[str], thresholds: np.ndarray, batch: int, compute: Compute,
  ):
    """`names` and `thresholds`, float32 (tags,), have the order of the model's tags."""
    self.prepare = TaggerImage(model.config.swin.image_size)
    self.names, self.thresholds, self.batch = [name.lower() for name in names], thresholds, batch
    self.compute, self.model = compute, compute.place(model)

  def tag(self, pictures: Sequence[UprightPicture]) -> list[Tags]:
    """The tags of each picture. A tag that the list has twice, in upper or lower case, gets the higher score."""
    return self.tag_prepared([self.prepare(picture.image) for picture in pictures])

  @torch.inference_mode()
  def tag_prepared(self, prepared: Sequence[np.ndarray]) -> list[Tags]:
    """As `tag`, for the outputs of `prepare`."""
    tags: list[Tags | None] = [None] * len(prepared)
    for positions, pixels in self.compute.batches(prepared, self.batch):
      for position, scores in zip(positions, self._score(pixels)):
        tags[position] = self._choose(scores)
    return tags

  def _score(self, pixels: torch.Tensor) -> np.ndarray:
    """uint8 (B, side, side, 3) -> float32 (B, tags) in [0, 1]."""
    with self.compute.autocast():
      logits = self.model(normalise(pixels))
    return logits.sigmoid().cpu().numpy()

  def _choose(self, scores: np.ndarray) -> Tags:
    """float32 (tags,), the scores of one picture -> its tags."""
    over = np.flatnonzero(scores > self.thresholds)
    chosen: dict[str, float] = {}
    for index in over[np.argsort(-scores[over], kind="stable")]:
      chosen.setdefault(self.names[index], scores[index])
    return Tags(tuple(chosen), np.array(list(chosen.values()), np.float32))


def load(checkpoint: str, backbone: str) -> RamPlusModel:
  """The model of a checkpoint, on the CPU, in float32. The number of tags follows from the embeddings.

  Raises:
    UserError: the file is missing or holds something else than one whole RAM++ with this backbone.
  """
  config, tensors = _CONFIGS[backbone], _official_weights(checkpoint)
  for other in _CONFIGS.keys() - {backbone}:
    require(_width(tensors) != _CONFIGS[other].swin.width,
            f"{checkpoint} is a Swin-{other[-1].upper()} file, not that of a {backbone}: set backbone={other}")
  if "label_embed" in tensors:
    numbers_per_tag = config.descriptions * config.text_width
    config = dataclasses.replace(config, tags=tensors["label_embed"].numel() // numbers_per_tag)
  with torch.device("meta"):  # takes no time for weights that are replaced at once
    model = RamPlusModel(config)
  fill(model, tensors, checkpoint, _REMEDIES["checkpoint"])
  return model


def _width(tensors: Mapping[str, torch.Tensor]) -> int | None:
  """Channels of the first stage of the backbone. None when the file is no RAM++."""
  bias = tensors.get("visual_encoder.patch_embed.proj.bias")
  return None if bias is None else bias.numel()


def _official_weights(checkpoint: str) -> dict[str, torch.Tensor]:
  """The weights of a file as float32, by the names of the model. Official files call the head `vision_multi`."""
  weights = {}
  for name, tensor in load_state_dict(checkpoint).items():
    if not name.endswith(_TABLES):
      weights[name.replace("vision_multi", "tagging_head")] = tensor.float()
  return weights


def read_vocabulary(tag_list: str, thresholds: str) -> tuple[list[str], np.ndarray]:
  """Reads the tags and their thresholds.

  Returns:
    The tags, and float32 (tags,): what the score of a tag must exceed.

  Raises:
    UserError: names the file and the line.
  """
  names, numbers = _read_lines(tag_list, "tag_list"), _read_lines(thresholds, "thresholds")
  require(len(names) > 0, f"{tag_list} has no tags. {_REMEDIES['tag_list']}")
  for line, name in enumerate(names, start=1):
    require(bool(name), f"{tag_list}: line {line} is empty, expected a tag on each line")
  require(len(numbers) == len(names), f"{thresholds} has {len(numbers)} thresholds, {tag_list} has {len(names)} tags: "
                                      "name two files that belong together")
  values = []
  for line, text in enumerate(numbers, start=1):
    values.append(_threshold(text, f"{thresholds}: line {line}"))
  return names, np.array(values, np.float32)


def _threshold(text: str, where: str) -> float:
  try:
    value = float(text)
  except ValueError:
    raise UserError(f"{where}: expected a number from 0 to 1, got {text!r}") from None
  require(0 <= value <= 1, f"{where}: expected a number from 0 to 1, got {text}")
  return value


def _read_lines(path: str, field: str) -> list[str]:
  try:
    text = existing_path(path, field, _REMEDIES[field]).read_text(encoding="utf-8")
  except UnicodeDecodeError:
    raise UserError(f"{path} is no text in UTF-8. {_REMEDIES[field]}") from None
  return [line.strip() for line in text.splitlines()]
