"""BLIP-2's ViT-g (config.model.vision.kind = "eva") as Hugging Face names it: `Blip2VisionModel`, below `vision_model`.

`from_lavis` translates LAVIS' names, below `visual_encoder`, to these.
"""

import re
from collections.abc import Mapping

import numpy as np

from lyrics_jax.config import VisionConfig
from lyrics_jax.weights.read import Index, Tensor
from lyrics_jax.weights.table import FIRST, LEAVES, PATCH, PLAIN, THIRDS, Entry, Form

PREFIX = "vision_model."
SIZES = {"image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size", "layers": "num_hidden_layers",
         "heads": "num_attention_heads", "mlp_dim": "intermediate_size", "norm_eps": "layer_norm_eps"}
FIXED = {"hidden_act": "gelu", "qkv_bias": True}
_OURS = "perception/vision/"
_PARAMETERS = {
    "patch/kernel": (f"{PREFIX}embeddings.patch_embedding.weight", PATCH),
    "patch/bias": (f"{PREFIX}embeddings.patch_embedding.bias", PLAIN),
    "class_token": (f"{PREFIX}embeddings.class_embedding", Form(lambda shape: (1, 1, *shape), lambda a: a[0, 0])),
    "positions": (f"{PREFIX}embeddings.position_embedding", FIRST),
}
_LAYER = {"attention_norm": "layer_norm1", "o": "self_attn.projection", "mlp_norm": "layer_norm2", "up": "mlp.fc1",
          "down": "mlp.fc2"}
_LAVIS = (
    (r"^visual_encoder\.cls_token$", f"{PREFIX}embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", f"{PREFIX}embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", f"{PREFIX}embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", rf"{PREFIX}encoder.layers.\1.layer_norm"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", rf"{PREFIX}encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", rf"{PREFIX}encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", rf"{PREFIX}encoder.layers.\1.mlp."),
)


def entry(path: str, shape: tuple[int, ...], config: VisionConfig) -> Entry:
  """Which tensors make up the image encoder's parameter `path`."""
  inner = path.removeprefix(_OURS)
  if inner in _PARAMETERS:
    name, form = _PARAMETERS[inner]
    return Entry((name,), form, shape)
  module, leaf = inner.removeprefix("stack/blocks/").split("/")
  suffix, form = LEAVES[leaf]
  theirs, form = ("self_attn.qkv", THIRDS[module]) if module in THIRDS else (_LAYER[module], form)
  names = tuple(f"{PREFIX}encoder.layers.{n}.{theirs}.{suffix}" for n in range(config.layers))
  return Entry(names, form, shape[1:], stacked=True)


def image_norm(name: str) -> str:
  """The norm behind the blocks is LAVIS' `ln_vision`, and ours of the image tokens."""
  return name.replace(f"{PREFIX}post_layernorm.", "ln_vision.")


def from_lavis(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Tensors of a ViT-g in LAVIS' names under Hugging Face's; all others as they are.

  LAVIS' keys have no bias: the one of queries, keys and values together has zeros in its middle third.
  """
  renamed = {}
  for name, tensor in tensors.items():
    for pattern, theirs in _LAVIS:
      name = re.sub(pattern, theirs, name)
    renamed[name] = tensor
  for name in [name for name in renamed if name.startswith(PREFIX) and name.endswith(".self_attn.q_bias")]:
    attention = name.removesuffix("q_bias")
    if f"{attention}v_bias" in renamed:
      renamed[f"{attention}qkv.bias"] = _with_zeros_between(renamed.pop(name), renamed.pop(f"{attention}v_bias"))
  return renamed


def _with_zeros_between(query: Tensor, value: Tensor) -> Tensor:
  def fetch(index: Index) -> np.ndarray:
    return np.concatenate([query.read(), np.zeros(query.shape, query.dtype), value.read()])[index]

  return Tensor(f"{query.name}, {value.name}", (2 * query.shape[0] + value.shape[0],), query.dtype, fetch)
