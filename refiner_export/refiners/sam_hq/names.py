"""The official SAM-HQ checkpoints (`sam_hq_vit_b.pth`, `_l`, `_h`): their names in transformers, and their sizes."""

import re
from collections.abc import Mapping

import torch
from transformers import SamHQConfig

from refiner_export.common.settings import require

# Official name -> transformers'. A `*` is a number; what follows a name stays; the first row that fits is taken, and a
# name that fits none is the same in both.
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
_ROWS = [(re.compile(re.escape(official).replace(r"\*", r"(\d+)") + r"(?=\.|$)"), theirs)
         for official, theirs in NAMES.items()]

_PATCH = "vision_encoder.patch_embed.projection.weight"  # (width, 3, patch, patch)
_GRID = "vision_encoder.pos_embed"                       # (1, grid, grid, width)
_ATTENTION = re.compile(r"vision_encoder\.layers\.(\d+)\.attn\.rel_pos_h")  # (2 * window - 1, width of a head)


def translate(name: str) -> str:
  """An official name in transformers' terms."""
  for pattern, theirs in _ROWS:
    if found := pattern.match(name):
      numbers = iter(found.groups())
      return re.sub(r"\*", lambda _: next(numbers), theirs) + name[found.end():]
  return name


def config_of(tensors: Mapping[str, torch.Tensor], source: str, remedy: str) -> SamHQConfig:
  """The sizes of a model, read off its tensors by transformers' names. Raises `UserError` when it is no SAM-HQ."""
  layers = {int(found[1]): tensors[found[0]].shape for found in map(_ATTENTION.fullmatch, tensors) if found}
  require(bool(layers) and all(name in tensors and tensors[name].dim() == 4 for name in (_PATCH, _GRID)),
          f"{source} is no SAM-HQ checkpoint with a ViT image encoder. {remedy}")
  width, _, patch, _ = tensors[_PATCH].shape
  grid = tensors[_GRID].shape[1]
  steps = lambda shape: (shape[0] + 1) // 2  # positions along a side that a layer's attention spans
  size = {"image_size": grid * patch, "patch_size": patch}
  return SamHQConfig(
      vision_config=size | {
          "hidden_size": width, "num_hidden_layers": len(layers),
          "num_attention_heads": width // next(iter(layers.values()))[1],
          "window_size": min(map(steps, layers.values())),
          "global_attn_indexes": sorted(index for index, shape in layers.items() if steps(shape) == grid)},
      prompt_encoder_config=size, mask_decoder_config={"vit_dim": width})
