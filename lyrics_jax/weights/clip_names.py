"""CLIP's image encoder in a Hugging Face directory (`CLIPModel` or `CLIPVisionModel`): the names of its weights."""

import re
from collections.abc import Mapping

import jax
from etils import epath

from lyrics_jax.config import ModelConfig
from lyrics_jax.weights import lyrics_names
from lyrics_jax.weights.lyrics_names import VISION_PREFIX
from lyrics_jax.weights.read import read_tensors
from lyrics_jax.weights.sizes import check_fixed, check_sizes, read_settings
from lyrics_jax.weights.table import Source, account
from refiner_export.common.settings import require

SIZES = {"image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size", "heads": "num_attention_heads",
         "mlp_dim": "intermediate_size", "norm_eps": "layer_norm_eps"}
LEFT_OVER = {
    "CLIP's text encoder": r"text_model\..*|text_projection\..*|logit_scale",
    "CLIP's projection of the class token": r"visual_projection\..*",
    "CLIP's final norm; that of the image tokens, which is trained, stands in its place":
        rf"{VISION_PREFIX}post_layernorm\..*",
    "position numbers": r".*\.position_ids",
}


def find(path: epath.Path, config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Source:
  """What the CLIP weights at `path` have for a model with parameters of these shapes.

  A configuration with one layer less than the file leaves out the last one, as BLIP-2 does.

  Raises:
    UserError: the file or the configuration stands in the way.
  """
  ours = config.vision
  require(ours.kind == "clip", f"{path}: CLIP's weights need config.model.vision.kind=clip, which is {ours.kind}")
  settings = read_settings(path)
  settings = {"hidden_act": "quick_gelu"} | settings.get("vision_config", settings)
  check_sizes(path, settings, ours, "config.model.vision", SIZES)
  check_fixed(path, settings, {"hidden_act": "quick_gelu"})
  tensors = {_whole_name(name): tensor for name, tensor in read_tensors(path).items()}
  numbers = [int(match[1]) for name in tensors if (match := re.match(rf"{VISION_PREFIX}encoder\.layers\.(\d+)\.", name))]
  require(bool(numbers), f"{path}: no CLIP image encoder in it; name a directory such as openai/clip-vit-large-patch14")
  depth = max(numbers) + 1
  require(ours.layers in (depth, depth - 1), f"{path}: the image encoder has {depth} layers, config.model.vision.layers"
                                             f"={ours.layers}; set config.model.vision.layers={depth}")
  reasons = LEFT_OVER
  if ours.layers < depth:
    last = rf"{VISION_PREFIX}encoder\.layers\.{depth - 1}\..*"
    reasons = reasons | {"the last layer, whose output is not read": last}
  inside = {name: shape for name, shape in shapes.items() if name.startswith("perception/vision/")}
  entries = lyrics_names.entries(config, inside)
  remedy = "make config.model.vision agree with the file"
  return account(str(path), tensors, entries, "vision".__eq__, lambda *_: remedy, reasons)


def _whole_name(name: str) -> str:
  """Some versions of transformers save `CLIPVisionModel` without the prefix."""
  bare = name.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."))
  return VISION_PREFIX + name if bare else name
