"""The published Lyrics weights, `Ziya-Visual-Lyrics-14B`: names of its generation model and of its pre-training model.

The image encoder is BLIP-2's ViT-g, the language model LLaMA. The Q-Former is BLIP-2's with a second cross-attention,
`detection_crossattention`. Its keys and values are made of the detector's 256 numbers a row directly: no linear map
to the common width stands before it, and it reads no boxes and no masks. Here that is a `local_tokens/detection`
which hands the 256 numbers on as they are, and kernels that read nothing else. Without mask tokens
(config.stage.model.connector.local.mask_rows=0) the MQ-Former then gives what the published one gives; the linear map
of mask tokens is as initialised.

The refiner's networks lie in the same files; `write_refiner` writes them out for refiner_export.
"""

import dataclasses
import re

import numpy as np
from absl import logging
from etils import epath

from lyrics_jax.models.base import ModelSettings
from lyrics_jax.weights import blip2
from lyrics_jax.weights import eva_names
from lyrics_jax.weights import llama_names
from lyrics_jax.weights.blip2 import FORMER
from lyrics_jax.weights.sizes import check_fixed, check_sizes, read_settings
from lyrics_jax.weights.stream import write_safetensors
from lyrics_jax.weights.table import (PLAIN, TRANSPOSED, Behind, Entry, Form, Made, Origin, Shape, Shapes, account,
                                      component)
from refiner_export.common.settings import require
from refiner_export.common.weight_files import read_tensors

QUERY_COUNTS = {"num_vit_query_tokens": 32, "num_dino_query_tokens": 64}  # where config.json does not say
Q_FORMER_SIZES = {
    "visual_queries": "num_vit_query_tokens", "grounding_queries": "num_dino_query_tokens", "width": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "mlp_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps", "cross_attention_frequency": "cross_attention_frequency", "activation": "hidden_act"}
REFINER = {"ram": "ram.safetensors", "grounding_dino": "grounding_dino.safetensors"}  # prefix of its names -> file
OPTIONAL = {"projection", "llm", "lm_head", "itm", "temperature"}  # components that only one of the two models has
LANGUAGE_PREFIX = "language_model."
LEFT_OVER = {
    "contrastive heads, which here read two pooled vectors": r"(vision|text)_proj\..*",
    "heads of stage 1": r"Qformer\.cls\..*|itm_head\..*|temp",
    "output words, tied to the word embedding": r"Qformer\.cls\.predictions\.decoder\..*",
    "position numbers": r".*\.position_ids",
    "the language model of stage 2": r"language_(model|projection)\..*",
    llama_names.ROTARY: r"language_model\..*\.rotary_emb\.inv_freq",
    "the refiner, for refiner_export": rf"({'|'.join(REFINER)})\..*",
}
_PROJECTION = {"connector/projection/kernel": ("language_projection.weight", TRANSPOSED),
               "connector/projection/bias": ("language_projection.bias", PLAIN)}


@dataclasses.dataclass(frozen=True)
class _Widened(Form):
  """The published kernel reads `rows` numbers, ours reads the common width and has zeros for the rest."""
  rows: int

  def shape(self, ours: Shape) -> Shape:
    return (ours[1], self.rows)

  def take(self, there: np.ndarray) -> np.ndarray:
    width = len(there)
    return np.pad(there.T, ((0, width - self.rows), (0, 0)))

  def give(self, ours: np.ndarray) -> np.ndarray:
    return ours[:self.rows].T

  def axes(self, dimensions: int) -> None:
    return None


def recognises(names: set[str]) -> bool:
  """Whether a file with tensors of these names is of the published Lyrics weights."""
  return any("detection_crossattention" in name for name in names)


def find(path: epath.Path, model: ModelSettings, shapes: Shapes) -> Origin:
  """What the published weights at `path` have for a model with parameters of these shapes. Raises `UserError`."""
  blip2.require_former(path, shapes)
  _check_settings(path, model, shapes)
  tensors = {}
  for name, tensor in read_tensors(path).items():
    tensors[blip2.lavis_name(name)] = tensor
  tensors = blip2.with_image_norm(tensors)
  require(recognises(tensors.keys()), f"{path}: no detection_crossattention in it; name a directory of "
                                      "Ziya-Visual-Lyrics-14B, or give the parts of another model one by one")
  entries = blip2.entries(model, shapes) | llama_names.entries(shapes, LANGUAGE_PREFIX)
  for ours, (name, form) in _PROJECTION.items():
    if ours in shapes:
      entries[ours] = Entry((name,), form, shapes[ours].shape)
  # Visual and grounding queries lie in one tensor, in our order.
  entries[f"{FORMER}/queries"] = Entry(("query_tokens",), Behind(1), shapes[f"{FORMER}/queries"].shape)
  entries |= _grounding(model, shapes)
  return account(str(path), tensors, entries, _required, _remedy, LEFT_OVER)


def _required(component: str) -> bool:
  return component not in OPTIONAL


def write_refiner(path: epath.Path, directory: epath.Path) -> None:
  """Writes RAM's and Grounding-DINO's weights, under their official names, where the files at `path` have them."""
  tensors = read_tensors(path)
  for prefix, file in REFINER.items():
    network = {}
    for name, tensor in tensors.items():
      if name.startswith(f"{prefix}."):
        network[name.removeprefix(f"{prefix}.")] = tensor
    if network:
      directory.mkdir(parents=True, exist_ok=True)
      write_safetensors(directory / file, network)
      logging.info("%d tensors of the refiner: %s/%s", len(network), directory.name, file)


def _check_settings(path: epath.Path, model: ModelSettings, shapes: Shapes) -> None:
  """Requires that the published config.json agrees with our settings."""
  settings = read_settings(path)
  vision, former, local = model.vision, model.connector.former, model.connector.local
  require(eva_names.is_vit_g(vision), f"{path}: its image encoder is ViT-g; set config.stage.model.vision to "
                                      "ViTSettings.eva_vit_g_14(), or to another size of it")
  published_vision = settings.get("vision_config") or {}
  check_sizes(path, published_vision, vision, "config.stage.model.vision", eva_names.SIZES)
  check_fixed(path, published_vision, eva_names.FIXED)
  published_former = QUERY_COUNTS | {"hidden_act": "gelu"} | (settings.get("qformer_config") or {})
  check_sizes(path, published_former, former, "config.stage.model.connector.former", Q_FORMER_SIZES)
  width = published_former.get("detection_encoder_hidden_size", local.feature_width)
  place = "config.stage.model.connector.local.feature_width"
  require(width == local.feature_width, f"{path}: its detector's rows are {width} wide, {place}={local.feature_width}; "
                                        f"set {place}={width}")
  require(width <= former.width,
          f"{path}: rows of {width} numbers do not fit config.stage.model.connector.former.width={former.width}")
  if llama_names.entries(shapes):
    llama_names.check(path, settings.get("text_config") or {}, model.llm)


def _grounding(model: ModelSettings, shapes: Shapes) -> dict[str, Entry]:
  """The second cross-attention, and the map of detection rows, which hands them on."""
  feature, width = model.connector.local.feature_width, model.connector.former.width
  entries, first_layers = {}, f"{FORMER}/stack/blocks/layers/0"
  for path, entry in blip2.entries(model, shapes).items():
    if path.startswith(f"{first_layers}/visual_attention/"):
      ours = path.replace("/visual_", "/grounding_")
      names = tuple(name.replace(".crossattention.", ".detection_crossattention.") for name in entry.names)
      form = _Widened(feature) if re.search(r"/[kv]/kernel$", path) else entry.form
      entries[ours] = Entry(names, form, shapes[ours].shape[1:], stacked=True)
  local = "connector/local_tokens"
  made = {f"{local}/detection/kernel": np.pad(np.eye(feature, width), ((0, 4), (0, 0))),  # nothing of the box
          f"{local}/detection/bias": np.zeros(width), f"{local}/source": np.zeros((2, width))}
  for path, value in made.items():
    entries[path] = Made((), PLAIN, value.shape, value=value.astype(np.float32))
  return entries


def _remedy(path: str, there: Shape, needed: Shape) -> str:
  settings = {"vision": "vision", "image_norm": "vision", "llm": "llm", "projection": "llm"}
  return f"make config.stage.model.{settings.get(component(path), 'connector.former')} agree with the file"
