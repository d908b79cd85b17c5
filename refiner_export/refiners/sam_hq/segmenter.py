"""SAM-HQ as the segmenter: one encode per picture, one decode for all boxes of a batch, one feature per object."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from etils import epath
from PIL import Image
from transformers import SamHQModel

from refiner_export.common.settings import Settings, require
from refiner_export.common.weight_files import load_state_dict, sha256
from refiner_export.records.features import FEATURE_WIDTH
from refiner_export.refiners.base import Detections, Segments, UprightPicture
from refiner_export.refiners.checkpoints import fill
from refiner_export.refiners.compute import Compute, normalise
from refiner_export.refiners.sam_hq.decoder import Decoded, MaskDecoder, mean_under, to_picture
from refiner_export.refiners.sam_hq.names import config_of, translate

_VERSION = 1  # raise it whenever the same picture would give other features
_REMEDY = ("Name the file sam_hq_vit_h.pth (or _l, _b) of the SAM-HQ project's release, or a directory in Hugging "
           "Face's form such as syscv-community/sam-hq-vit-huge")
_WEIGHTS = "model.safetensors"
_TIED = {"prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding"}
_NOTHING = Segments(np.zeros((0, FEATURE_WIDTH), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32), ())
_NORM_EPS = 1e-5  # of the decoder's transformer in training; the default of transformers is 1e-6


@dataclasses.dataclass(unsafe_hash=True)
class SamHQ(Settings):
  """Settings of SAM-HQ with the ViT-B, L or H that the checkpoint holds.

  Attributes:
    checkpoint: the official .pth file, or a directory in Hugging Face's form.
    feature: of each object. `hq_token` is the token from which the decoder makes the mask. `mask_pooled` is the mean of
      the image embedding under the mask.
    store_masks: whether records hold the masks too.
    batch: pictures in one encode.
    box_batch: boxes in one decode, from any pictures of the batch. A box takes about 40 MB.
  """
  checkpoint: str
  feature: Literal["hq_token", "mask_pooled"] = "hq_token"
  store_masks: bool = False
  batch: int = 4
  box_batch: int = 64

  NAME: ClassVar[str] = "sam_hq"  # in descriptions
  FILES: ClassVar[tuple[str, ...]] = ("checkpoint",)  # fields that name files

  def check(self, path: str) -> None:
    for name in ("batch", "box_batch"):
      require(getattr(self, name) >= 1, f"{path}.{name}: expected at least 1, got {getattr(self, name)}")
    require(not self.store_masks or importlib.util.find_spec("pycocotools") is not None,
            f"{path}.store_masks needs pycocotools: pip install pycocotools")
    weights = _weights_file(self.checkpoint)
    require(weights.is_file(), f"{path}.checkpoint: not found: {weights}. {_REMEDY}")

  def build(self, compute: Compute) -> "SamHQSegmenter":
    """Loads the model onto the device. Raises `UserError` when the checkpoint is not a whole SAM-HQ."""
    model = load(self.checkpoint)
    return SamHQSegmenter(
        model.vision_encoder, MaskDecoder(model), model.config.vision_config.image_size, self, compute)

  def describe(self) -> dict:
    """Everything that decides the segments. The digest is that of the file with the weights."""
    return {"name": self.NAME, "version": _VERSION, "checkpoint": sha256(_weights_file(self.checkpoint)),
            "feature": self.feature, "store_masks": self.store_masks}


@dataclasses.dataclass(frozen=True)
class SegmenterImage:
  """Resizes pictures so that the longer side has `side` pixels, and pads them on the right and below.

  The training of SAM-HQ did the same.
  """
  side: int

  def __call__(self, image: Image.Image) -> np.ndarray:
    """An RGB picture -> uint8 (side, side, 3), zeros outside the picture."""
    width, height = self.extent(image.size)
    padded = np.zeros((self.side, self.side, 3), np.uint8)
    padded[:height, :width] = image.resize((width, height), Image.Resampling.BILINEAR)
    return padded

  def extent(self, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height inside the square of a picture with this width and height. The official code rounds so too."""
    width, height = (max(1, int(length * self.side / max(size) + 0.5)) for length in size)
    return width, height


class SamHQSegmenter:
  """Masks the boxes of detections; see `Segmenter`.

  Attributes:
    prepare: makes the model's input from a picture. It does not refer to the model, so that it can be sent to other
      processes.
  """

  def __init__(self, encoder: torch.nn.Module, decoder: torch.nn.Module, side: int, settings: SamHQ, compute: Compute):
    """Places the networks on the device.

    Args:
      encoder: has the output of `SamHQVisionEncoder` of transformers.
      decoder: has the methods of `MaskDecoder`.
      side: pixels along a side of the square picture that the encoder takes.
      settings, compute: how to run the networks.
    """
    self.settings, self.compute = settings, compute
    self.prepare = SegmenterImage(side)
    self.encoder, self.decoder = compute.place(encoder), compute.place(decoder)

  def segment(self, pictures: Sequence[UprightPicture], detections: Sequence[Detections]) -> list[Segments]:
    """The segments of each picture, in the order of its boxes. A picture without boxes is not encoded."""
    sizes = [picture.image.size for picture in pictures]
    return self.segment_prepared([self.prepare(picture.image) for picture in pictures], sizes, detections)

  @torch.inference_mode()
  def segment_prepared(
      self, prepared: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], detections: Sequence[Detections],
  ) -> list[Segments]:
    """As `segment`, for the outputs of `prepare`. `sizes` are the width and height of each picture."""
    results = [_NOTHING] * len(prepared)
    with_boxes = [index for index, found in enumerate(detections) if len(found.boxes)]
    inputs = [prepared[index] for index in with_boxes]
    for positions, pixels in self.compute.batches(inputs, self.settings.batch):
      indices = [with_boxes[position] for position in positions]
      segments = self._run(
          pixels, [sizes[index] for index in indices], [detections[index].boxes for index in indices])
      for index, found in zip(indices, segments):
        results[index] = found
    return results

  def _run(
      self, pixels: torch.Tensor, sizes: Sequence[tuple[int, int]], boxes: Sequence[np.ndarray],
  ) -> list[Segments]:
    """Encodes pictures once, and decodes the boxes of all of them together.

    Args:
      pixels: uint8 (B, side, side, 3).
      sizes: width and height of each picture.
      boxes: for each picture (K, 4) xyxy in [0, 1].
    """
    extents = [self.prepare.extent(size) for size in sizes]
    embeddings, early = self._encode(pixels, extents)
    decoded = self._decode(embeddings, early, extents, boxes)
    counts = [len(picture_boxes) for picture_boxes in boxes]
    tokens, logits, ious = (values.split(counts) for values in decoded)
    segments = []
    for index, size in enumerate(sizes):
      kept = Decoded(tokens[index], logits[index], ious[index])
      segments.append(self._keep(size, extents[index], embeddings[index], kept))
    return segments

  def _encode(self, pixels: torch.Tensor, extents: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the encoder.

    Returns:
      embeddings: float32 (B, 256, h, w), the output of the encoder.
      early: float32 (B, h, w, D), the output of its first layer with global attention.
    """
    images = normalise(pixels)
    for image, (width, height) in zip(images, extents):  # padding is zero after normalisation, not before
      image[:, height:] = 0
      image[:, :, width:] = 0
    with self.compute.autocast():
      encoded = self.encoder(images)
    return encoded.last_hidden_state.float(), encoded.intermediate_embeddings[0].float()

  def _decode(
      self, embeddings: torch.Tensor, early: torch.Tensor, extents: Sequence[tuple[int, int]],
      boxes: Sequence[np.ndarray],
  ) -> Decoded:
    """Decodes the boxes of all pictures as one list of prompts, `box_batch` boxes at a time."""
    prompts, owners = [], []
    for index, extent in enumerate(extents):
      prompts.append(boxes[index] * np.tile(extent, 2))
      owners.append(np.full(len(boxes[index]), index))
    prompts = torch.from_numpy(np.concatenate(prompts).astype(np.float32)).to(embeddings.device)
    owners = torch.from_numpy(np.concatenate(owners)).to(embeddings.device)
    hq = self.decoder.fuse(embeddings, early)
    size = self.settings.box_batch
    decoded = []
    for some_prompts, some_owners in zip(prompts.split(size), owners.split(size)):
      decoded.append(self.decoder(embeddings, hq, some_prompts, some_owners))
    return Decoded(*map(torch.cat, zip(*decoded)))

  def _keep(
      self, size: tuple[int, int], extent: tuple[int, int], embedding: torch.Tensor, decoded: Decoded,
  ) -> Segments:
    """The segments of one picture. Masks at the size of the picture are made `box_batch` at a time."""
    side = self.prepare.side
    features = decoded.tokens
    if self.settings.feature == "mask_pooled":
      features = mean_under(embedding, decoded.logits, side, extent)
    areas, rles = [], []
    for logits in decoded.logits.split(self.settings.box_batch):
      masks = to_picture(logits, side, extent, size)
      areas.append(masks.float().mean((1, 2)))
      if self.settings.store_masks:
        rles += to_rles(masks.cpu().numpy())
    return Segments(features.cpu().numpy(), decoded.ious.cpu().numpy(), torch.cat(areas).cpu().numpy(), tuple(rles))


def to_rles(masks: np.ndarray) -> list[bytes]:
  """bool (K, H, W) -> the compressed `counts` of COCO's run-length code of each mask, whose `size` is (H, W)."""
  from pycocotools import mask as coco_mask  # only needed to store masks
  codes = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
  return [code["counts"] for code in codes]


def load(checkpoint: str) -> SamHQModel:
  """The model of a checkpoint, on the CPU, in float32. Its size follows from the weights.

  Raises:
    UserError: the file is missing or holds something else than one whole SAM-HQ.
  """
  tensors = {}
  for name, tensor in load_state_dict(_weights_file(checkpoint)).items():
    tensors[name] = tensor.float()
  if any(name.startswith("image_encoder.") for name in tensors):  # an official file
    tensors = {translate(name): tensor for name, tensor in tensors.items()}
  for shared in _TIED & tensors.keys():  # files hold this tensor under one name or under both
    tensors = dict.fromkeys(_TIED, tensors[shared]) | tensors
  config = config_of(tensors, checkpoint, _REMEDY)
  config.mask_decoder_config.layer_norm_eps = _NORM_EPS
  with torch.device("meta"):  # takes no time for weights that are replaced at once
    model = SamHQModel(config)
  fill(model, tensors, checkpoint, _REMEDY)
  return model


def _weights_file(checkpoint: str) -> epath.Path:
  path = epath.Path(checkpoint)
  return path / _WEIGHTS if path.is_dir() else path
