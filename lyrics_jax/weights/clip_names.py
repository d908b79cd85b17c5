"""CLIP's image encoder in a Hugging Face directory (`CLIPModel` or `CLIPVisionModel`): the names of its weights."""

import re

from etils import epath

from lyrics_jax.models.base import ModelSettings
from lyrics_jax.weights.sizes import check_fixed, check_sizes, read_settings
from lyrics_jax.weights.table import PATCH, PLAIN, Names, Origin, Shape, Shapes, account
from refiner_export.common.settings import require
from refiner_export.common.weight_files import read_tensors

PREFIX = "vision_model."
NAMES = Names(
    "vision",
    parameters={
        "patch/kernel": ("embeddings.patch_embedding.weight", PATCH),
        "class_token": ("embeddings.class_embedding", PLAIN),
        "positions": ("embeddings.position_embedding.weight", PLAIN),
    },
    modules={
        "patch": "embeddings.patch_embedding",  # its bias, which CLIP lacks and an exported ViT-g has
        "input_norm": "pre_layrnorm",  # the spelling of CLIP's files
    },
    layers="encoder.layers",
    layer={"attention_norm": "layer_norm1.", "q": "self_attn.q_proj.", "k": "self_attn.k_proj.",
           "v": "self_attn.v_proj.", "o": "self_attn.out_proj.", "mlp_norm": "layer_norm2.", "up": "mlp.fc1.",
           "down": "mlp.fc2."})
SIZES = {"image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size", "heads": "num_attention_heads",
         "mlp_dim": "intermediate_size", "norm_eps": "layer_norm_eps"}
LAST_LAYER = "the last layer, whose output is not read"
FINAL_NORM = "CLIP's final norm"
LEFT_OVER = {
    "CLIP's text encoder": r"text_model\..*|text_projection\..*|logit_scale",
    "CLIP's projection of the class token": r"visual_projection\..*",
    FINAL_NORM: rf"{PREFIX}post_layernorm\..*",  # Lyrics trains a norm of its own for the image tokens, LLaVA has none
    "position numbers": r".*\.position_ids",
}
_BARE = "embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."


def recognises(names: set[str]) -> bool:
  """Whether a file with tensors of these names holds a CLIP image encoder."""
  return any(_whole_name(name).startswith(f"{PREFIX}encoder.layers.") for name in names)


def find(path: epath.Path, model: ModelSettings, shapes: Shapes) -> Origin:
  """What the CLIP weights at `path` have for a model with parameters of these shapes.

  Where the model has one layer less than the file, the last layer is left out, as in BLIP-2 and LLaVA.

  Raises:
    UserError: the file is not whole, or does not fit the model.
  """
  settings = read_settings(path)
  check(path, settings.get("vision_config", settings), model)
  tensors = {}
  for name, tensor in read_tensors(path).items():
    tensors[_whole_name(name)] = tensor
  reasons = LEFT_OVER | depth_reasons(path, tensors.keys(), PREFIX, model)
  return account(str(path), tensors, NAMES.entries(shapes, PREFIX), "vision".__eq__, remedy, reasons)


def check(path: epath.Path, settings: dict, model: ModelSettings) -> None:
  """Requires that the config.json of CLIP agrees with our settings."""
  vision = model.vision
  require(vision.input_norm and not vision.patch_bias and vision.activation == "quick_gelu",
          f"{path}: its image encoder is CLIP's; set config.stage.model.vision.input_norm=True, patch_bias=False and "
          "activation=quick_gelu, as ViTSettings.clip_vit_l_14() has them")
  settings = {"hidden_act": "quick_gelu"} | settings
  check_sizes(path, settings, vision, "config.stage.model.vision", SIZES)
  check_fixed(path, settings, {"hidden_act": "quick_gelu"})


def depth_reasons(path: epath.Path, names: set[str], prefix: str, model: ModelSettings) -> dict[str, str]:
  """Why layers are left over: none, or the last one. Raises `UserError` for any other depth."""
  numbers = set()
  for name in names:
    if match := re.match(rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.", name):
      numbers.add(int(match[1]))
  require(bool(numbers), f"{path}: no CLIP image encoder in it; name a directory such as openai/clip-vit-large-patch14")
  depth, wanted = max(numbers) + 1, model.vision.layers
  where = "config.stage.model.vision.layers"
  require(wanted in (depth, depth - 1),
          f"{path}: the image encoder has {depth} layers, {where}={wanted}; set {where}={depth}")
  if wanted == depth:
    return {}
  return {LAST_LAYER: rf"{re.escape(prefix)}encoder\.layers\.{depth - 1}\..*"}


def remedy(path: str, there: Shape, needed: Shape) -> str:
  """What to do about a tensor of another shape; see `account`."""
  return "make config.stage.model.vision agree with the file"


def _whole_name(name: str) -> str:
  """Some versions of transformers save `CLIPVisionModel` without the prefix."""
  return PREFIX + name if name.startswith(_BARE) else name
