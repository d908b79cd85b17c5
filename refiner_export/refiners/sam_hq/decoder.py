"""SAM-HQ's masks of boxes (Ke et al. 2023, Segment Anything in High Quality), over the modules of transformers.

`SamHQMaskDecoder.forward` of transformers drops the image embeddings that its two-way transformer has updated, and
makes the masks of the raw ones: they are not SAM-HQ's. Its modules and their weights are right, and are put together
here as the paper and the official implementation do, for many boxes of many pictures at once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import SamHQModel

# Rows of a box's tokens: IoU, the single mask, three masks for prompts of several meanings, HQ mask, the two corners.
_IOU, _SINGLE_MASK, _HQ_MASK = 0, 1, 5


class Decoded(NamedTuple):
  """What M boxes gave; all float32."""
  tokens: torch.Tensor  # (M, 256), the HQ token of each: what the decoder's transformer has gathered of the object
  logits: torch.Tensor  # (M, 4h, 4w) of the masks, positive inside
  ious: torch.Tensor    # (M,), how well the model believes that each mask fits


class MaskDecoder(torch.nn.Module):
  """Prompt encoder and mask decoder for box prompts, one mask per box: the sum of SAM's logits and the HQ mask's."""

  def __init__(self, model: SamHQModel):
    super().__init__()
    self.prompt_encoder, self.parts = model.prompt_encoder, model.mask_decoder
    self.register_buffer("positions", model.get_image_wide_positional_embeddings().detach(), persistent=False)

  def fuse(self, embeddings: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """The HQ features of B pictures, which all boxes of a picture share.

    Args:
      embeddings: float32 (B, 256, h, w), the encoder's output.
      early: float32 (B, h, w, D), the output of its first global attention layer.

    Returns:
      float32 (B, 32, 4h, 4w).
    """
    parts = self.parts
    late = F.gelu(parts.encoder_norm(parts.encoder_conv1(embeddings)))
    fine = F.gelu(parts.compress_vit_norm(parts.compress_vit_conv1(early.permute(0, 3, 1, 2))))
    return parts.encoder_conv2(late) + parts.compress_vit_conv2(fine)

  def forward(self, embeddings: torch.Tensor, hq: torch.Tensor, boxes: torch.Tensor, owners: torch.Tensor) -> Decoded:
    """Decodes boxes, each in its own picture; no box sees another.

    Args:
      embeddings: float32 (B, 256, h, w), the encoder's output.
      hq: float32 (B, 32, 4h, 4w), from `fuse`.
      boxes: float32 (M, 4) xyxy in pixels of the encoder's input.
      owners: int64 (M,), the picture of each box.
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
  """(M, c) and (M, c, H, W) -> (M, H, W): a linear classifier of pixels, another one for each box."""
  return torch.einsum("mc,mchw->mhw", weights, features)


def to_picture(logits: torch.Tensor, side: int, extent: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
  """The masks at the picture's own size, as upstream: upsampled to the encoder's input, cut to the picture, resized.

  Args:
    logits: float32 (M, 4h, 4w).
    side: pixels of the encoder's input, which is square.
    extent: width and height of the picture within it; the rest is padding.
    size: width and height of the picture itself.

  Returns:
    bool (M, height, width).
  """
  resize = lambda x, shape: F.interpolate(x, shape, mode="bilinear", align_corners=False)
  within = resize(logits[:, None], (side, side))[:, :, :extent[1], :extent[0]]
  return resize(within, (size[1], size[0]))[:, 0] > 0


def mean_under(embedding: torch.Tensor, logits: torch.Tensor, side: int, extent: tuple[int, int]) -> torch.Tensor:
  """The image embedding averaged under each mask; a cell counts by the share of it that the mask covers.

  Args:
    embedding: float32 (256, h, w) of one picture.
    logits: float32 (M, 4h, 4w) of its masks.
    side, extent: as in `to_picture`; padding is under no mask.

  Returns:
    float32 (M, 256); zeros for an empty mask.
  """
  height, width = logits.shape[1:]
  centres = lambda n: (torch.arange(n, device=logits.device) + 0.5) * (side / n)
  inside = (logits > 0) & (centres(height)[:, None] < extent[1]) & (centres(width) < extent[0])
  shares = F.avg_pool2d(inside.float(), height // embedding.shape[1])
  return torch.einsum("mhw,chw->mc", shares, embedding) / shares.sum((1, 2)).clamp(min=1e-6)[:, None]
