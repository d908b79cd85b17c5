"""SAM-HQ of the package segment_anything_hq as the segmenter."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from etils import epath

from refiner_export.common.settings import require
from refiner_export.common.weight_files import load_state_dict
from refiner_export.refiners.checkpoints import fill
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.originals import distribution_version, load_package, require_uncompiled
from refiner_export.refiners.sam_hq.decoder import Decoded
from refiner_export.refiners.sam_hq.segmenter import SamHQ, SamHQSegmenter

_DISTRIBUTION = "segment-anything-hq"
_INSTALL = "Install segment-anything-hq==0.3 in an environment of its own, as constraints-original.txt says"
_REMEDY = "Name the file sam_hq_vit_h.pth (or _l, _b) of the SAM-HQ project's release"
_WIDTH = "image_encoder.patch_embed.proj.bias"
_SIZES = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # width of the encoder -> name in the package


@dataclasses.dataclass(unsafe_hash=True)
class OriginalSamHQ(SamHQ):
  """Settings of SAM-HQ as the package segment_anything_hq runs it.

  Attributes, where they differ from those of `SamHQ`:
    checkpoint: the official .pth file.
    box_batch: boxes of one picture in one decode, because the package decodes every picture alone.
  """
  NAME: ClassVar[str] = "original_sam_hq"

  def check(self, path: str) -> None:
    load_package("segment_anything_hq", path, _INSTALL)
    require(epath.Path(self.checkpoint).is_file(), f"{path}.checkpoint: {self.checkpoint} is not a file. {_REMEDY}")
    super().check(path)

  def build(self, compute: Compute) -> SamHQSegmenter:
    """Loads the model onto the device. Raises `UserError` when the checkpoint is not a whole SAM-HQ."""
    require_uncompiled(compute)
    sam = load(self.checkpoint)
    return SamHQSegmenter(_Encoder(sam), _Decoder(sam), sam.image_encoder.img_size, self, compute)

  def describe(self) -> dict:
    """As `SamHQ.describe`, with the version of the package, which decides the segments too."""
    return super().describe() | {"package": distribution_version(_DISTRIBUTION)}


class _Encoded(NamedTuple):
  """The outputs of an encoder, with the names of transformers.

  Attributes:
    last_hidden_state: (B, 256, h, w).
    intermediate_embeddings: (B, h, w, D), one per layer with global attention.
  """
  last_hidden_state: torch.Tensor
  intermediate_embeddings: list[torch.Tensor]


class _Encoder(torch.nn.Module):
  """The package's image encoder with the outputs of the encoder of transformers."""

  def __init__(self, sam: torch.nn.Module):
    super().__init__()
    self.encoder = sam.image_encoder

  def forward(self, pixel_values: torch.Tensor) -> _Encoded:
    return _Encoded(*self.encoder(pixel_values))


class _Decoder(torch.nn.Module):
  """The package's prompt encoder and mask decoder with the inputs and outputs of `MaskDecoder`."""

  def __init__(self, sam: torch.nn.Module):
    super().__init__()
    self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder

  def fuse(self, embeddings: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """Returns `early`, because the package makes the HQ features from it in every decode."""
    return early

  def forward(
      self, embeddings: torch.Tensor, early: torch.Tensor, boxes: torch.Tensor, owners: torch.Tensor,
  ) -> Decoded:
    """Decodes boxes picture by picture. The boxes of a picture must follow each other. See `MaskDecoder.forward`."""
    pictures, counts = owners.unique_consecutive(return_counts=True)
    decoded = []
    for picture, picture_boxes in zip(pictures.tolist(), boxes.split(counts.tolist())):
      decoded.append(self._decode(embeddings[picture, None], early[picture, None], picture_boxes))
    return Decoded(*map(torch.cat, zip(*decoded)))

  def _decode(self, embedding: torch.Tensor, early: torch.Tensor, boxes: torch.Tensor) -> Decoded:
    """One picture: (1, 256, h, w) and (1, h, w, D), and its boxes, (K, 4)."""
    corners, no_mask = self.prompt_encoder(points=None, boxes=boxes, masks=None)
    tokens = []

    def keep(module, inputs, output):
      tokens.append(output[0])

    with self.mask_decoder.transformer.register_forward_hook(keep):
      logits, ious = self.mask_decoder(
          image_embeddings=embedding, image_pe=self.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=corners,
          dense_prompt_embeddings=no_mask, multimask_output=False, hq_token_only=False, interm_embeddings=[early])
    hq_token = self.mask_decoder.num_mask_tokens  # the last mask token; the IoU token is token 0
    return Decoded(tokens[0][:, hq_token], logits[:, 0], ious[:, 0])


def load(checkpoint: str) -> torch.nn.Module:
  """The package's model with the weights of an official file, on the CPU, in float32.

  Raises:
    UserError: the file is missing or holds something else than one whole SAM-HQ with a ViT-B, L or H.
  """
  package = load_package("segment_anything_hq", OriginalSamHQ.__name__, _INSTALL)
  tensors = {}
  for name, tensor in load_state_dict(checkpoint).items():
    tensors[name] = tensor.float()
  size = _SIZES.get(len(tensors.get(_WIDTH, ())))
  require(size is not None, f"{checkpoint} is no official SAM-HQ checkpoint with a ViT-B, L or H. {_REMEDY}")
  sam = package.sam_model_registry[size]()
  fill(sam, tensors, checkpoint, _REMEDY)
  return sam
