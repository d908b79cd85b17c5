"""RAM++ as the tagger: a picture's tags are those of a list whose score exceeds the tag's own threshold."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from refiner_export.refiners.base import Picture, Tags
from refiner_export.refiners.checkpoints import fill, load_state_dict, sha256
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.ram_plus.model import RAM_PLUS_SWIN_B, RAM_PLUS_SWIN_L, RamPlusModel
from refiner_export.refiners.ram_plus.image import TaggerImage
from refiner_export.common.settings import Settings, UserError, existing_path, require

_VERSION = 1  # to be raised whenever the same picture would give other tags
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB in 0 to 255
_CONFIGS = {"swin_l": RAM_PLUS_SWIN_L, "swin_b": RAM_PLUS_SWIN_B}
_FILES = {"checkpoint": "ram_plus_swin_large_14m.pth of the recognize-anything project's release",
          "tag_list": "ram_tag_list.txt of the recognize-anything project",
          "thresholds": "ram_tag_list_threshold.txt of the recognize-anything project"}
_REMEDY = f"Name the file {_FILES['checkpoint']}"


@dataclasses.dataclass(unsafe_hash=True)
class RamPlus(Settings):
  """RAM++.

  Attributes:
    checkpoint: the official .pth file, or its weights as .safetensors.
    tag_list: a text file with a tag on each line, in the order of the checkpoint's embeddings.
    thresholds: a text file with a number on each line, in the order of the tags. A tag is in a picture when its score
      exceeds it, so that 1 forbids the tag.
    backbone: size of the image encoder in the checkpoint; what is published has Swin-L.
    batch: pictures in one pass; each takes about 200 MB.
  """
  checkpoint: str
  tag_list: str
  thresholds: str
  backbone: Literal["swin_l", "swin_b"] = "swin_l"
  batch: int = 16

  def check(self, path: str) -> None:
    require(self.batch >= 1, f"{path}.batch: expected at least 1, got {self.batch}")
    for field, origin in _FILES.items():
      file = existing_path(getattr(self, field), f"{path}.{field}", f"Name the file {origin}")
      require(not file.is_dir(), f"{path}.{field}: {file} is a directory. Name the file {origin}")
    read_vocabulary(self.tag_list, self.thresholds)

  def build(self, compute: Compute) -> "RamPlusTagger":
    """Loads the model onto the device. Raises `UserError` when the files are not those of one whole RAM++."""
    names, thresholds = read_vocabulary(self.tag_list, self.thresholds)
    model = load(self.checkpoint, self.backbone)
    require(model.config.tags == len(names),
            f"{self.tag_list} has {len(names)} tags, {self.checkpoint} has embeddings of {model.config.tags}: "
            "name the list that the checkpoint was made with")
    return RamPlusTagger(model, names, thresholds, self.batch, compute)

  def describe(self) -> dict:
    """What decides the result; digests are those of the files."""
    return {"name": "ram_plus", "version": _VERSION, **{field: sha256(getattr(self, field)) for field in _FILES},
            "backbone": self.backbone, "image_size": _CONFIGS[self.backbone].swin.image_size}


class RamPlusTagger:
  """Tags pictures; see `Tagger`.

  Attributes:
    prepare: makes the model's input of a picture. It holds nothing of the model and can be sent to other processes.
  """

  def __init__(
      self, model: RamPlusModel, names: Sequence[str], thresholds: np.ndarray, batch: int, compute: Compute,
  ):
    """`names` and `thresholds`, float32, are those of the model's tags, in its order."""
    self.prepare = TaggerImage(model.config.swin.image_size)
    self.names, self.thresholds, self.batch = [name.lower() for name in names], thresholds, batch
    self.compute, self.model = compute, compute.place(model)

  def tag(self, pictures: Sequence[Picture]) -> list[Tags]:
    """The tags of each picture; one that is on the list twice, in whatever case, has the higher score."""
    return self.tag_prepared([self.prepare(picture.image) for picture in pictures])

  @torch.inference_mode()
  def tag_prepared(self, prepared: Sequence[np.ndarray]) -> list[Tags]:
    """As `tag`, of pictures that `prepare` has been over."""
    tags: list[Tags | None] = [None] * len(prepared)
    for positions, pixels in self.compute.batches(prepared, self.batch):
      for position, scores in zip(positions, self._score(pixels)):
        tags[position] = self._choose(scores)
    return tags

  def _score(self, pixels: torch.Tensor) -> np.ndarray:
    """uint8 (B, side, side, 3) -> float32 (B, tags) in [0, 1]."""
    colour = lambda values: torch.tensor(values, device=pixels.device)
    images = ((pixels - colour(_MEAN)) / colour(_STD)).permute(0, 3, 1, 2)
    with self.compute.autocast():
      logits = self.model(images)
    return logits.sigmoid().cpu().numpy()

  def _choose(self, scores: np.ndarray) -> Tags:
    over = np.flatnonzero(scores > self.thresholds)
    chosen: dict[str, float] = {}
    for index in over[np.argsort(-scores[over], kind="stable")]:
      chosen.setdefault(self.names[index], scores[index])
    return Tags(tuple(chosen), np.array(list(chosen.values()), np.float32))


def load(checkpoint: str, backbone: str) -> RamPlusModel:
  """The model of a checkpoint, on the CPU, in float32; how many tags it knows is read off the embeddings.

  Raises:
    UserError: there are no weights, or not exactly those of a RAM++ with this backbone.
  """
  config, tensors = _CONFIGS[backbone], _official_weights(checkpoint)
  for other in _CONFIGS.keys() - {backbone}:
    require(_width(tensors) != _CONFIGS[other].swin.width,
            f"{checkpoint} is a Swin-{other[-1].upper()} file, not that of a {backbone}: set backbone={other}")
  if "label_embed" in tensors:
    of_one = config.descriptions * config.text_width
    config = dataclasses.replace(config, tags=tensors["label_embed"].numel() // of_one)
  with torch.device("meta"):  # no time for weights that are replaced at once
    model = RamPlusModel(config)
  fill(model, tensors, checkpoint, _REMEDY)
  return model


def _width(tensors: Mapping[str, torch.Tensor]) -> int | None:
  """Channels of the backbone's first stage."""
  bias = tensors.get("visual_encoder.patch_embed.proj.bias")
  return None if bias is None else bias.numel()


def _official_weights(checkpoint: str) -> dict[str, torch.Tensor]:
  """As float32 by the model's names, without the tables that are computed."""
  return {name.replace("vision_multi", "tagging_head"): tensor.float()
          for name, tensor in load_state_dict(checkpoint).items()
          if not re.search(r"\.(relative_position_index|attn_mask)$", name)}


def read_vocabulary(tag_list: str, thresholds: str) -> tuple[list[str], np.ndarray]:
  """The tags, and float32 (tags,) what the score of each must exceed. Raises `UserError` that names file and line."""
  names, numbers = _read_lines(tag_list, "tag_list"), _read_lines(thresholds, "thresholds")
  require(len(names) > 0, f"{tag_list} has no tags. Name the file {_FILES['tag_list']}")
  for line, name in enumerate(names, start=1):
    require(bool(name), f"{tag_list}: line {line} is empty, expected a tag on each line")
  require(len(numbers) == len(names), f"{thresholds} has {len(numbers)} thresholds, {tag_list} has {len(names)} tags: "
                                      "name two files that belong together")
  values = [_threshold(text, f"{thresholds}: line {line}") for line, text in enumerate(numbers, start=1)]
  return names, np.array(values, np.float32)


def _threshold(text: str, where: str) -> float:
  try:
    value = float(text)
  except ValueError:
    raise UserError(f"{where}: expected a number from 0 to 1, got {text!r}") from None
  require(0 <= value <= 1, f"{where}: expected a number from 0 to 1, got {text}")
  return value


def _read_lines(path: str, field: str) -> list[str]:
  remedy = f"Name the file {_FILES[field]}"
  try:
    text = existing_path(path, field, remedy).read_text(encoding="utf-8")
  except UnicodeDecodeError:
    raise UserError(f"{path} is no text in UTF-8. {remedy}") from None
  return [line.strip() for line in text.splitlines()]
