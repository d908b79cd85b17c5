"""BLIP-2's ViT-g as Hugging Face names it: `Blip2VisionModel`, below `vision_model`.

`from_lavis` translates LAVIS' names, below `visual_encoder`, to these.
"""

import re
from collections.abc import Mapping

import numpy as np

from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.weights.table import PATCH, PLAIN, THIRDS, Behind, Names
from refiner_export.common.weight_files import Index, Tensor

PREFIX = "vision_model."
NAMES = Names(
    "vision",
    parameters={
        "patch/kernel": ("embeddings.patch_embedding.weight", PATCH),
        "patch/bias": ("embeddings.patch_embedding.bias", PLAIN),
        "class_token": ("embeddings.class_embedding", Behind(2)),
        "positions": ("embeddings.position_embedding", Behind(1)),
    },
    modules={},
    layers="encoder.layers",
    layer={"attention_norm": "layer_norm1.", "q": "self_attn.qkv.", "k": "self_attn.qkv.", "v": "self_attn.qkv.",
           "o": "self_attn.projection.", "mlp_norm": "layer_norm2.", "up": "mlp.fc1.", "down": "mlp.fc2."},
    forms=THIRDS)
SIZES = {"image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size", "layers": "num_hidden_layers",
         "heads": "num_attention_heads", "mlp_dim": "intermediate_size", "norm_eps": "layer_norm_eps"}
FIXED = {"hidden_act": "gelu", "qkv_bias": True}
_LAVIS = (
    (r"^visual_encoder\.cls_token$", f"{PREFIX}embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", f"{PREFIX}embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", f"{PREFIX}embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", rf"{PREFIX}encoder.layers.\1.layer_norm"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", rf"{PREFIX}encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", rf"{PREFIX}encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", rf"{PREFIX}encoder.layers.\1.mlp."),
)


def is_vit_g(vision: ViTSettings) -> bool:
  """Whether an image encoder is built like BLIP-2's ViT-g; its size does not matter."""
  return vision.patch_bias and not vision.input_norm and vision.activation == "gelu"


def image_norm(name: str) -> str:
  """The name of the norm behind the blocks: `ln_vision` in LAVIS' files, the norm of the image tokens here."""
  return name.replace(f"{PREFIX}post_layernorm.", "ln_vision.")


def from_lavis(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Tensors of a ViT-g in LAVIS' names under Hugging Face's names; all others stay as they are.

  LAVIS' keys have no bias. Hugging Face's one bias of queries, keys and values has zeros in its middle third.
  """
  renamed = {}
  for name, tensor in tensors.items():
    for pattern, replacement in _LAVIS:
      name = re.sub(pattern, replacement, name)
    renamed[name] = tensor
  for name in list(renamed):
    attention = name.removesuffix("q_bias")
    if name.startswith(PREFIX) and name.endswith(".self_attn.q_bias") and f"{attention}v_bias" in renamed:
      renamed[f"{attention}qkv.bias"] = _with_zeros_between(renamed.pop(name), renamed.pop(f"{attention}v_bias"))
  return renamed


def _with_zeros_between(query: Tensor, value: Tensor) -> Tensor:
  def fetch(index: Index) -> np.ndarray:
    return np.concatenate([query.read(), np.zeros(query.shape, query.dtype), value.read()])[index]

  return Tensor(f"{query.name}, {value.name}", (2 * query.shape[0] + value.shape[0],), query.dtype, fetch)
