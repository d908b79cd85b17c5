"""The mask decoder of SAM-HQ for box prompts, over the modules of transformers.

Source: Ke et al. 2023, Segment Anything in High Quality.

`SamHQMaskDecoder.forward` of transformers drops the image embeddings that its two-way transformer has updated, and
makes the masks from the embeddings before the update. Such masks are not SAM-HQ's. The modules and their weights are
right. They are put together here as in the paper and in the official implementation, for many boxes of many pictures
at once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import SamHQModel

# The tokens of a box: IoU, single mask, three masks for prompts of several meanings, HQ mask, two corners.
_IOU, _SINGLE_MASK, _HQ_MASK = 0, 1, 5


class Decoded(NamedTuple):
  """The results of M boxes, all float32.

  Attributes:
    tokens: (M, 256), the HQ tokens after the decoder's transformer, which describe the objects.
    logits: (M, 4h, 4w) of the masks, positive inside.
    ious: (M,), the model's estimate of how well the masks fit.
  """
  tokens: torch.Tensor
  logits: torch.Tensor
  ious: torch.Tensor


class MaskDecoder(torch.nn.Module):
  """Prompt encoder and mask decoder for box prompts. Every box gets one mask.

  The logits of a mask are the sum of the logits of SAM's single mask and of the HQ mask.
  """

  def __init__(self, model: SamHQModel):
    super().__init__()
    self.prompt_encoder, self.parts = model.prompt_encoder, model.mask_decoder
    self.register_buffer("positions", model.get_image_wide_positional_embeddings().detach(), persistent=False)

  def fuse(self, embeddings: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """The HQ features of B pictures. All boxes of a picture share them.

    Args:
      embeddings: float32 (B, 256, h, w), the output of the encoder.
      early: float32 (B, h, w, D), the output of the encoder's first layer with global attention.

    Returns:
      float32 (B, 32, 4h, 4w).
    """
    parts = self.parts
    late = F.gelu(parts.encoder_norm(parts.encoder_conv1(embeddings)))
    fine = F.gelu(parts.compress_vit_norm(parts.compress_vit_conv1(early.permute(0, 3, 1, 2))))
    return parts.encoder_conv2(late) + parts.compress_vit_conv2(fine)

  def forward(self, embeddings: torch.Tensor, hq: torch.Tensor, boxes: torch.Tensor, owners: torch.Tensor) -> Decoded:
    """Decodes boxes of several pictures. Boxes do not attend to each other.

    Args:
      embeddings: float32 (B, 256, h, w), the output of the encoder.
      hq: float32 (B, 32, 4h, 4w), from `fuse`.
      boxes: float32 (M, 4) xyxy in pixels of the encoder's input.
      owners: int64 (M,), the number of the picture of each box.
    """
    parts = self.parts
    corners, no_mask = self.prompt_encoder(
        input_points=None, input_labels=None, input_boxes=boxes[None], input_masks=None)
    learned = torch.cat([parts.iou_token.weight, parts.mask_tokens.weight, parts.hq_token.weight])
    prompts = torch.cat([learned.expand(len(boxes), -1, -1), corners[0]], dim=1)
    tokens, image = parts.transformer(
        point_embeddings=prompts[:, None], image_embeddings=(embeddings + no_mask)[owners],
        image_positional_embeddings=self.positions, attention_similarity=None)
    tokens, image = tokens[:, 0], image[:, 0].transpose(1, 2).unflatten(2, embeddings.shape[2:])
    image = F.gelu(parts.upscale_layer_norm(parts.upscale_conv1(image)))
    image = F.gelu(parts.upscale_conv2(image))
    fine = parts.mask_conv2(F.gelu(parts.mask_norm(parts.mask_conv1(image)))) + hq[owners]
    logits = (_mask(parts.output_hypernetworks_mlps[0](tokens[:, _SINGLE_MASK]), image)
              + _mask(parts.hq_mask_mlp(tokens[:, _HQ_MASK]), fine))
    return Decoded(tokens[:, _HQ_MASK], logits, parts.iou_prediction_head(tokens[:, _IOU])[:, 0])


def _mask(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
  """A linear classifier of pixels, with separate weights for each box: (M, c) and (M, c, H, W) -> (M, H, W)."""
  return torch.einsum("mc,mchw->mhw", weights, features)


def to_picture(logits: torch.Tensor, side: int, extent: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
  """Masks at the size of the picture.

  The logits are resized to the encoder's input, cut to the picture, and resized to the size of the picture, as in the
  official implementation.

  Args:
    logits: float32 (M, 4h, 4w).
    side: pixels along a side of the encoder's input, which is square.
    extent: width and height of the picture inside the encoder's input; the rest is padding.
    size: width and height of the picture.

  Returns:
    bool (M, height, width).
  """
  square = _resize(logits[:, None], side, side)
  picture = square[:, :, :extent[1], :extent[0]]
  return _resize(picture, size[1], size[0])[:, 0] > 0


def _resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
  """(M, 1, H, W) -> (M, 1, height, width)."""
  return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def mean_under(embedding: torch.Tensor, logits: torch.Tensor, side: int, extent: tuple[int, int]) -> torch.Tensor:
  """Averages the image embedding under each mask. The weight of a cell is the share of it that the mask covers.

  Args:
    embedding: float32 (256, h, w) of one picture.
    logits: float32 (M, 4h, 4w) of the masks of this picture.
    side, extent: as in `to_picture`. Padding belongs to no mask.

  Returns:
    float32 (M, 256); zeros for an empty mask.
  """
  height, width = logits.shape[1:]
  y = (torch.arange(height, device=logits.device) + 0.5) * (side / height)  # centres of the cells, in pixels
  x = (torch.arange(width, device=logits.device) + 0.5) * (side / width)
  inside = (logits > 0) & (y[:, None] < extent[1]) & (x < extent[0])
  shares = F.avg_pool2d(inside.float(), height // embedding.shape[1])
  return torch.einsum("mhw,chw->mc", shares, embedding) / shares.sum((1, 2)).clamp(min=1e-6)[:, None]
