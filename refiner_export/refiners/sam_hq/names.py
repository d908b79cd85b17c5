"""Official SAM-HQ checkpoints (`sam_hq_vit_b.pth`, `_l`, `_h`): names of weights, and sizes read from weights."""

import re
from collections.abc import Mapping

import torch
from transformers import SamHQConfig

from refiner_export.common.settings import require
from refiner_export.refiners.checkpoints import insert_numbers, prefix_pattern

# The beginning of an official name -> the beginning of the name in transformers. The rest of a name stays. `*` is a
# number. The first row that fits counts. A name that fits no row is the same in both.
NAMES = {
    "image_encoder.patch_embed.proj": "vision_encoder.patch_embed.projection",
    "image_encoder.blocks.*.norm*": "vision_encoder.layers.*.layer_norm*",
    "image_encoder.blocks": "vision_encoder.layers",
    "image_encoder.neck.0": "vision_encoder.neck.conv1",
    "image_encoder.neck.1": "vision_encoder.neck.layer_norm1",
    "image_encoder.neck.2": "vision_encoder.neck.conv2",
    "image_encoder.neck.3": "vision_encoder.neck.layer_norm2",
    "image_encoder": "vision_encoder",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
    "prompt_encoder.point_embeddings": "prompt_encoder.point_embed",
    "prompt_encoder.mask_downscaling.0": "prompt_encoder.mask_embed.conv1",
    "prompt_encoder.mask_downscaling.1": "prompt_encoder.mask_embed.layer_norm1",
    "prompt_encoder.mask_downscaling.3": "prompt_encoder.mask_embed.conv2",
    "prompt_encoder.mask_downscaling.4": "prompt_encoder.mask_embed.layer_norm2",
    "prompt_encoder.mask_downscaling.6": "prompt_encoder.mask_embed.conv3",
    "mask_decoder.transformer.layers.*.norm*": "mask_decoder.transformer.layers.*.layer_norm*",
    "mask_decoder.transformer.norm_final_attn": "mask_decoder.transformer.layer_norm_final_attn",
    "mask_decoder.output_upscaling.0": "mask_decoder.upscale_conv1",
    "mask_decoder.output_upscaling.1": "mask_decoder.upscale_layer_norm",
    "mask_decoder.output_upscaling.3": "mask_decoder.upscale_conv2",
    "mask_decoder.output_hypernetworks_mlps.*.layers.0": "mask_decoder.output_hypernetworks_mlps.*.proj_in",
    "mask_decoder.output_hypernetworks_mlps.*.layers.1": "mask_decoder.output_hypernetworks_mlps.*.layers.0",
    "mask_decoder.output_hypernetworks_mlps.*.layers.2": "mask_decoder.output_hypernetworks_mlps.*.proj_out",
    "mask_decoder.iou_prediction_head.layers.0": "mask_decoder.iou_prediction_head.proj_in",
    "mask_decoder.iou_prediction_head.layers.1": "mask_decoder.iou_prediction_head.layers.0",
    "mask_decoder.iou_prediction_head.layers.2": "mask_decoder.iou_prediction_head.proj_out",
    "mask_decoder.hf_token": "mask_decoder.hq_token",
    "mask_decoder.hf_mlp.layers.0": "mask_decoder.hq_mask_mlp.proj_in",
    "mask_decoder.hf_mlp.layers.1": "mask_decoder.hq_mask_mlp.layers.0",
    "mask_decoder.hf_mlp.layers.2": "mask_decoder.hq_mask_mlp.proj_out",
    "mask_decoder.compress_vit_feat.0": "mask_decoder.compress_vit_conv1",
    "mask_decoder.compress_vit_feat.1": "mask_decoder.compress_vit_norm",
    "mask_decoder.compress_vit_feat.3": "mask_decoder.compress_vit_conv2",
    "mask_decoder.embedding_encoder.0": "mask_decoder.encoder_conv1",
    "mask_decoder.embedding_encoder.1": "mask_decoder.encoder_norm",
    "mask_decoder.embedding_encoder.3": "mask_decoder.encoder_conv2",
    "mask_decoder.embedding_maskfeature.0": "mask_decoder.mask_conv1",
    "mask_decoder.embedding_maskfeature.1": "mask_decoder.mask_norm",
    "mask_decoder.embedding_maskfeature.3": "mask_decoder.mask_conv2",
}
_RULES = [(prefix_pattern(official), name) for official, name in NAMES.items()]

_PATCH = "vision_encoder.patch_embed.projection.weight"  # (width, 3, patch, patch)
_GRID = "vision_encoder.pos_embed"                       # (1, grid, grid, width)
_ATTENTION = re.compile(r"vision_encoder\.layers\.(\d+)\.attn\.rel_pos_h")  # (2 * window - 1, width of a head)


def translate(name: str) -> str:
  """The name in transformers of an official name."""
  for pattern, translated in _RULES:
    if found := pattern.fullmatch(name):
      *numbers, rest = found.groups(default="")
      return insert_numbers(translated, numbers) + rest
  return name


def config_of(tensors: Mapping[str, torch.Tensor], file: str, remedy: str) -> SamHQConfig:
  """The sizes of a model, read from its tensors.

  Args:
    tensors: by the names of transformers.
    file: where the tensors come from, for the error.
    remedy: what to do about a file that does not fit, for the error.

  Raises:
    UserError: the tensors are not those of a SAM-HQ with a ViT.
  """
  spans, head_width = {}, 0  # a layer's attention spans this many patches along a side
  for name, tensor in tensors.items():
    if found := _ATTENTION.fullmatch(name):
      spans[int(found[1])] = (tensor.shape[0] + 1) // 2
      head_width = tensor.shape[1]
  known = bool(spans)
  for name in (_PATCH, _GRID):
    known = known and name in tensors and tensors[name].dim() == 4
  require(known, f"{file} is no SAM-HQ checkpoint with a ViT image encoder. {remedy}")
  width, _, patch, _ = tensors[_PATCH].shape
  grid = tensors[_GRID].shape[1]
  size = {"image_size": grid * patch, "patch_size": patch}
  return SamHQConfig(
      vision_config=size | {
          "hidden_size": width, "num_hidden_layers": len(spans), "num_attention_heads": width // head_width,
          "window_size": min(spans.values()),
          "global_attn_indexes": sorted(layer for layer, span in spans.items() if span == grid)},
      prompt_encoder_config=size, mask_decoder_config={"vit_dim": width})
