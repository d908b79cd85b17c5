"""SAM-HQ of the package segment_anything_hq as the segmenter."""

import dataclasses
from typing import NamedTuple

import torch
from etils import epath

from refiner_export.refiners.checkpoints import fill, load_state_dict
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.originals import distribution_version, load_package, require_uncompiled
from refiner_export.refiners.sam_hq.segmenter import SamHQ, SamHQSegmenter
from refiner_export.refiners.sam_hq.decoder import Decoded
from refiner_export.common.settings import require

_DISTRIBUTION = "segment-anything-hq"
_INSTALL = "Install segment-anything-hq==0.3 in an environment of its own, as constraints-original.txt says"
_REMEDY = "Name the file sam_hq_vit_h.pth (or _l, _b) of the SAM-HQ project's release"
_WIDTH = "image_encoder.patch_embed.proj.bias"
_SIZES = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # width of the encoder -> the package's name


@dataclasses.dataclass(unsafe_hash=True)
class OriginalSamHQ(SamHQ):
  """SAM-HQ as the package segment_anything_hq runs it.

  Attributes are those of `SamHQ`, but that

    checkpoint: is the official .pth file.
    box_batch: is of boxes of one picture; the package decodes each picture for itself.
  """

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
    """As that of `SamHQ`, with the package's version."""
    return {**super().describe(), "name": "original_sam_hq", "package": distribution_version(_DISTRIBUTION)}


class _Encoded(NamedTuple):
  """As transformers names them."""
  last_hidden_state: torch.Tensor              # (B, 256, h, w)
  intermediate_embeddings: list[torch.Tensor]  # of each global attention layer, (B, h, w, D)


class _Encoder(torch.nn.Module):
  """The package's image encoder with the output of that of transformers."""

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
    """`early`: the package makes the HQ features of it in each decode."""
    return early

  def forward(
      self, embeddings: torch.Tensor, early: torch.Tensor, boxes: torch.Tensor, owners: torch.Tensor,
  ) -> Decoded:
    """Decodes boxes, each in its own picture; boxes of one picture follow each other. See `MaskDecoder.forward`."""
    pictures, counts = owners.unique_consecutive(return_counts=True)
    decoded = [self._decode(embeddings[picture, None], early[picture, None], some)
               for picture, some in zip(pictures.tolist(), boxes.split(counts.tolist()))]
    return Decoded(*(torch.cat(parts) for parts in zip(*decoded)))

  def _decode(self, embedding: torch.Tensor, early: torch.Tensor, boxes: torch.Tensor) -> Decoded:
    """One picture, (1, 256, h, w) and (1, h, w, D)."""
    corners, no_mask = self.prompt_encoder(points=None, boxes=boxes, masks=None)
    seen = []
    with self.mask_decoder.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output[0])):
      logits, ious = self.mask_decoder(
          image_embeddings=embedding, image_pe=self.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=corners,
          dense_prompt_embeddings=no_mask, multimask_output=False, hq_token_only=False, interm_embeddings=[early])
    hq_token = self.mask_decoder.num_mask_tokens  # the last of the mask tokens, which follow the IoU token
    return Decoded(seen[0][:, hq_token], logits[:, 0], ious[:, 0])


def load(checkpoint: str) -> torch.nn.Module:
  """The package's model with the weights of an official file, on the CPU, in float32.

  Raises:
    UserError: there are no weights, or not exactly those of a SAM-HQ with a ViT-B, L or H.
  """
  package = load_package("segment_anything_hq", OriginalSamHQ.__name__, _INSTALL)
  tensors = {name: tensor.float() for name, tensor in load_state_dict(checkpoint).items()}
  size = _SIZES.get(len(tensors.get(_WIDTH, ())))
  require(size is not None, f"{checkpoint} is no official SAM-HQ checkpoint with a ViT-B, L or H. {_REMEDY}")
  sam = package.sam_model_registry[size]()
  fill(sam, tensors, checkpoint, _REMEDY)
  return sam
