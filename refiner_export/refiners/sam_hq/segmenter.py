"""SAM-HQ as the segmenter: one encode per picture, all boxes of a batch in one decode, a feature of each object."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from etils import epath
from transformers import SamHQModel

from refiner_export.records.record import FEATURE_WIDTH
from refiner_export.refiners.base import Detections, Picture, Segments
from refiner_export.refiners.checkpoints import fill, load_state_dict, sha256
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.sam_hq.decoder import MaskDecoder, mean_under, to_picture
from refiner_export.refiners.sam_hq.image import SegmenterImage
from refiner_export.refiners.sam_hq.names import config_of, translate
from refiner_export.common.settings import Settings, require

_VERSION = 1  # to be raised whenever the same picture would give other features
_REMEDY = ("Name the file sam_hq_vit_h.pth (or _l, _b) of the SAM-HQ project's release, or a directory in Hugging "
           "Face's form such as syscv-community/sam-hq-vit-huge")
_WEIGHTS = "model.safetensors"
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB in 0 to 255
_TIED = {"prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding"}
_NOTHING = Segments(np.zeros((0, FEATURE_WIDTH), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32), ())
_NORM_EPS = 1e-5  # of the layers of the decoder's transformer where the model was trained; transformers has 1e-6


@dataclasses.dataclass(unsafe_hash=True)
class SamHQ(Settings):
  """SAM-HQ with the ViT-B, L or H that the checkpoint holds.

  Attributes:
    checkpoint: the official .pth file, or a directory in Hugging Face's form.
    feature: of each object. `hq_token` is the token from which the decoder makes the mask; `mask_pooled` is the image
      embedding averaged under the mask.
    store_masks: whether records get the masks too.
    batch: pictures in one encode.
    box_batch: boxes in one decode, whichever pictures of the batch they are in; each takes about 40 MB.
  """
  checkpoint: str
  feature: Literal["hq_token", "mask_pooled"] = "hq_token"
  store_masks: bool = False
  batch: int = 4
  box_batch: int = 64

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
    """What decides the result; the digest is that of the file with the weights."""
    return {"name": "sam_hq", "version": _VERSION, "checkpoint": sha256(_weights_file(self.checkpoint)),
            "feature": self.feature, "store_masks": self.store_masks}


class SamHQSegmenter:
  """Masks the boxes of detections; see `Segmenter`.

  Attributes:
    prepare: makes the model's input of a picture. It holds nothing of the model and can be sent to other processes.
  """

  def __init__(self, encoder: torch.nn.Module, decoder: torch.nn.Module, side: int, settings: SamHQ, compute: Compute):
    """`encoder` has the output of transformers' `SamHQVisionEncoder`, `decoder` the methods of `MaskDecoder`.

    `side` is that of the square picture which the encoder takes, in pixels.
    """
    self.settings, self.compute = settings, compute
    self.prepare = SegmenterImage(side)
    self.encoder, self.decoder = compute.place(encoder), compute.place(decoder)

  def segment(self, pictures: Sequence[Picture], detections: Sequence[Detections]) -> list[Segments]:
    """The objects of each picture, in the order of its boxes. A picture without boxes is not encoded."""
    sizes = [picture.image.size for picture in pictures]
    return self.segment_prepared([self.prepare(picture.image) for picture in pictures], sizes, detections)

  @torch.inference_mode()
  def segment_prepared(
      self, prepared: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], detections: Sequence[Detections],
  ) -> list[Segments]:
    """As `segment`, of pictures of these widths and heights that `prepare` has been over."""
    results = [_NOTHING] * len(prepared)
    busy = [index for index, found in enumerate(detections) if len(found.boxes)]
    for positions, pixels in self.compute.batches([prepared[index] for index in busy], self.settings.batch):
      batch = [busy[position] for position in positions]
      segments = self._run(pixels, [sizes[index] for index in batch], [detections[index].boxes for index in batch])
      for index, found in zip(batch, segments):
        results[index] = found
    return results

  def _run(
      self, pixels: torch.Tensor, sizes: Sequence[tuple[int, int]], boxes: Sequence[np.ndarray],
  ) -> list[Segments]:
    """One encode of uint8 (B, side, side, 3); the boxes of all pictures, (K, 4) each, are one list of prompts."""
    extents = [self.prepare.extent(size) for size in sizes]
    counts = [len(of_picture) for of_picture in boxes]
    prompts = np.concatenate([of_picture * np.tile(extent, 2) for of_picture, extent in zip(boxes, extents)])
    on_device = lambda array: torch.from_numpy(array).to(pixels.device).split(self.settings.box_batch)
    chunks = zip(on_device(prompts.astype(np.float32)), on_device(np.repeat(np.arange(len(boxes)), counts)))
    embeddings, early = self._encode(pixels, extents)
    hq = self.decoder.fuse(embeddings, early)
    decoded = [self.decoder(embeddings, hq, *chunk) for chunk in chunks]
    of_pictures = [torch.cat(parts).split(counts) for parts in zip(*decoded)]
    return [self._keep(*of_picture) for of_picture in zip(sizes, extents, embeddings, *of_pictures)]

  def _encode(self, pixels: torch.Tensor, extents: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's output, float32 (B, 256, h, w), and that of its first global attention layer, (B, h, w, D)."""
    normalised = (pixels - pixels.new_tensor(_MEAN, dtype=torch.float32)) / pixels.new_tensor(_STD, dtype=torch.float32)
    for picture, (width, height) in zip(normalised, extents):  # padding is zero after normalisation, not before
      picture[height:], picture[:, width:] = 0, 0
    with self.compute.autocast():
      encoded = self.encoder(normalised.permute(0, 3, 1, 2))
    return encoded.last_hidden_state.float(), encoded.intermediate_embeddings[0].float()

  def _keep(
      self, size: tuple[int, int], extent: tuple[int, int], embedding: torch.Tensor,
      tokens: torch.Tensor, logits: torch.Tensor, ious: torch.Tensor,
  ) -> Segments:
    """What is kept of one picture."""
    side = self.prepare.side
    pooled = self.settings.feature == "mask_pooled"
    features = mean_under(embedding, logits, side, extent) if pooled else tokens
    areas, rles = [], []
    for some in logits.split(self.settings.box_batch):
      masks = to_picture(some, side, extent, size)
      areas.append(masks.float().mean((1, 2)))
      rles += to_rles(masks.cpu().numpy()) if self.settings.store_masks else []
    return Segments(features.cpu().numpy(), ious.cpu().numpy(), torch.cat(areas).cpu().numpy(), tuple(rles))


def to_rles(masks: np.ndarray) -> list[bytes]:
  """bool (K, H, W) -> the compressed `counts` of COCO's run-length code of each mask; its `size` is (H, W)."""
  from pycocotools import mask as coco_mask  # only who stores masks needs it
  return [code["counts"] for code in coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))]


def load(checkpoint: str) -> SamHQModel:
  """The model of a checkpoint, on the CPU, in float32; its size is read off the weights.

  Raises:
    UserError: there are no weights, or not exactly those of a SAM-HQ.
  """
  tensors = {name: tensor.float() for name, tensor in load_state_dict(_weights_file(checkpoint)).items()}
  if any(name.startswith("image_encoder.") for name in tensors):
    tensors = {translate(name): tensor for name, tensor in tensors.items()}
  for shared in _TIED & tensors.keys():  # files hold it under either name or both
    tensors = {name: tensors[shared] for name in _TIED} | tensors
  config = config_of(tensors, checkpoint, _REMEDY)
  config.mask_decoder_config.layer_norm_eps = _NORM_EPS
  with torch.device("meta"):  # no time for weights that are replaced at once
    model = SamHQModel(config)
  fill(model, tensors, checkpoint, _REMEDY)
  return model


def _weights_file(checkpoint: str) -> epath.Path:
  path = epath.Path(checkpoint)
  return path / _WEIGHTS if path.is_dir() else path
