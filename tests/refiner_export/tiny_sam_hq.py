"""A SAM-HQ with a thin encoder of two layers for 128 pixels, with random weights, in both forms of a checkpoint."""

import pathlib
import re

import torch
from safetensors.torch import save_file
from transformers import SamHQConfig, SamHQModel

SIDE, GRID, WIDTH = 128, 8, 32

# Names in transformers -> official names. This table was written from the modules of the official package.
_OFFICIAL = [
    (r"^vision_encoder\.neck\.conv(\d)", lambda m: f"image_encoder.neck.{2 * int(m[1]) - 2}"),
    (r"^vision_encoder\.neck\.layer_norm(\d)", lambda m: f"image_encoder.neck.{2 * int(m[1]) - 1}"),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"^shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"(?<=\.)point_embed\.", "point_embeddings."),
    (r"(?<=\.)mask_embed\.(\w+)", lambda m: "mask_downscaling." + {
        "conv1": "0", "layer_norm1": "1", "conv2": "3", "layer_norm2": "4", "conv3": "6"}[m[1]]),
    (r"layer_norm", "norm"),
    (r"hq_token", "hf_token"),
    (r"hq_mask_mlp", "hf_mlp"),
    (r"(mlps\.\d|head|hf_mlp)\.(proj_in|layers\.0|proj_out)", lambda m: f"{m[1]}.layers." + {
        "proj_in": "0", "layers.0": "1", "proj_out": "2"}[m[2]]),
    (r"upscale_(conv1|norm|conv2)", lambda m: "output_upscaling." + {"conv1": "0", "norm": "1", "conv2": "3"}[m[1]]),
    (r"(?<=mask_decoder\.)(compress_vit|encoder|mask)_(conv1|norm|conv2)", lambda m: {
        "compress_vit": "compress_vit_feat.", "encoder": "embedding_encoder.", "mask": "embedding_maskfeature."}[m[1]]
        + {"conv1": "0", "norm": "1", "conv2": "3"}[m[2]]),
]


def weights() -> dict[str, torch.Tensor]:
  """Random tensors by the names of transformers. They are so large that every tensor changes the results."""
  size = {"image_size": SIDE}
  with torch.device("meta"):
    model = SamHQModel(SamHQConfig(
        vision_config=size | {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "window_size": 3,
                              "global_attn_indexes": [1]},
        prompt_encoder_config=size, mask_decoder_config={"vit_dim": WIDTH}))
  random = torch.Generator().manual_seed(11)  # this seed gives masks that are neither empty nor full
  drawn = {}
  for name, parameter in model.named_parameters():
    values = torch.randn(parameter.shape, generator=random)
    if name.endswith("bias"):
      values *= 0.2
    elif "norm" in name:
      values = 1 + 0.2 * values
    elif not re.search(r"_tokens?\.weight$|(point|mask)_embed(\.\d)?\.weight$|pos_embed$|positional_embedding$", name):
      values *= parameter[0].numel() ** -0.5
    drawn[name] = values
  return drawn


def official(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """The same tensors under the official names."""
  renamed = {}
  for name, tensor in tensors.items():
    for pattern, replacement in _OFFICIAL:
      name = re.sub(pattern, replacement, name)
    renamed[name] = tensor
  return renamed


def write_official(path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> str:
  torch.save(official(tensors), path)
  return str(path)


def write_directory(path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> str:
  path.mkdir()
  save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
  return str(path)
