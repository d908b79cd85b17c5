"""The published Lyrics weights, `Ziya-Visual-Lyrics-14B`: names of its generation model and of its pre-training model.

The image encoder is BLIP-2's ViT-g, the language model LLaMA; the Q-Former is BLIP-2's with a second cross-attention,
`detection_crossattention`, whose keys and values are made of the detector's 256 numbers a row directly: no linear map to
the common width before it, no boxes and no masks. Here that is a `local_tokens/detection` which hands those numbers on as
they are, and kernels that read nothing else. Without mask tokens (config.model.refiner.mask_rows=0) the MQ-Former then
gives what theirs gives; the linear map of mask tokens is as initialised.

The refiner's networks lie in the same files; `write_refiner` writes them out for refiner_export.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from etils import epath

from lyrics_jax.config import ModelConfig
from lyrics_jax.weights import blip2
from lyrics_jax.weights import eva_names
from lyrics_jax.weights import llama_names
from lyrics_jax.weights import lyrics_names
from lyrics_jax.weights.read import read_tensors
from lyrics_jax.weights.sizes import check_fixed, check_sizes, read_settings
from lyrics_jax.weights.stream import write_safetensors
from lyrics_jax.weights.table import FIRST, PLAIN, TRANSPOSED, Entry, Form, Made, Source, account, part
from refiner_export.common.settings import require

FORMER = blip2.FORMER
QUERY_COUNTS = {"num_vit_query_tokens": 32, "num_dino_query_tokens": 64}  # where config.json does not say
Q_FORMER_SIZES = {
    "visual_queries": "num_vit_query_tokens", "grounding_queries": "num_dino_query_tokens", "width": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "mlp_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps", "cross_attention_frequency": "cross_attention_frequency", "activation": "hidden_act"}
REFINER = {"ram": "ram.safetensors", "grounding_dino": "grounding_dino.safetensors"}  # prefix of its names -> file
OPTIONAL = {"projection", "llm", "lm_head", "itm", "temperature"}  # parts that only one of the two models has
LEFT_OVER = {
    "contrastive heads, which here read two pooled vectors": r"(vision|text)_proj\..*",
    "heads of stage 1": r"Qformer\.cls\..*|itm_head\..*|temp",
    "output words, tied to the word embedding": r"Qformer\.cls\.predictions\.decoder\..*",
    "position numbers": r".*\.position_ids",
    "the language model of stage 2": r"language_(model|projection)\..*",
    "rotary frequencies, computed here": r"language_model\..*\.rotary_emb\.inv_freq",
    "the refiner, for refiner_export": rf"({'|'.join(REFINER)})\..*",
}
_PROJECTION = {"projection/kernel": ("language_projection.weight", TRANSPOSED),
               "projection/bias": ("language_projection.bias", PLAIN)}


def find(path: epath.Path, config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Source:
  """What the published weights at `path` have for a model with parameters of these shapes. Raises `UserError`."""
  _check_settings(path, config)
  tensors = {eva_names.image_norm(blip2.lavis_name(name)): tensor for name, tensor in read_tensors(path).items()}
  require(any("detection_crossattention" in name for name in tensors), f"{path}: no detection_crossattention in it; name "
          "a directory of Ziya-Visual-Lyrics-14B, or give the parts of another model one by one")
  entries = blip2.q_former_entries(config, shapes)
  entries |= lyrics_names.entries(config, {ours: shape for ours, shape in shapes.items() if ours.startswith("llm/")})
  entries |= {ours: Entry((name,), form, shapes[ours].shape) for ours, (name, form) in _PROJECTION.items()
              if ours in shapes}
  entries[f"{FORMER}/queries"] = Entry(("query_tokens",), FIRST, shapes[f"{FORMER}/queries"].shape)
  entries |= _grounding(config, shapes)
  return account(str(path), tensors, entries, lambda name: name not in OPTIONAL, _remedy, LEFT_OVER)


def write_refiner(path: epath.Path, directory: epath.Path) -> None:
  """Writes RAM's and Grounding-DINO's weights, under their official names, where the files at `path` have them."""
  tensors = read_tensors(path)
  for prefix, file in REFINER.items():
    own = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()
           if name.startswith(f"{prefix}.")}
    if own:
      directory.mkdir(parents=True, exist_ok=True)
      write_safetensors(directory / file, own)
      logging.info("%d tensors of the refiner: %s/%s", len(own), directory.name, file)


def _check_settings(path: epath.Path, config: ModelConfig) -> None:
  """Requires that their config.json agrees with our configuration."""
  settings = read_settings(path)
  require(config.vision.kind == "eva", f"{path}: its image encoder is ViT-g; set config.model.vision.kind=eva and its "
                                       "sizes, as VisionConfig.vit_g() has them")
  vision, former, text = (settings.get(f"{name}_config") or {} for name in ("vision", "qformer", "text"))
  check_sizes(path, vision, config.vision, "config.model.vision", eva_names.SIZES)
  check_fixed(path, vision, eva_names.FIXED)
  former = QUERY_COUNTS | {"hidden_act": "gelu"} | former
  check_sizes(path, former, config.mq_former, "config.model.mq_former", Q_FORMER_SIZES)
  width = former.get("detection_encoder_hidden_size", config.refiner.feature_width)
  ours = config.refiner.feature_width
  require(width == ours, f"{path}: its detector's rows are {width} wide, config.model.refiner.feature_width={ours}; "
                         f"set config.model.refiner.feature_width={width}")
  require(width <= config.mq_former.width, f"{path}: rows of {width} numbers do not fit config.model.mq_former.width="
                                           f"{config.mq_former.width}")
  llama_names.check(path, text, config.llm)


def _grounding(config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Entry]:
  """The second cross-attention, and the map of detection rows, which hands them on."""
  feature, width = config.refiner.feature_width, config.mq_former.width
  padded = Form(lambda shape: (shape[1], feature), lambda a: np.pad(a.T, ((0, width - feature), (0, 0))))
  entries, root = {}, f"{FORMER}/stack/blocks/layers/0"
  for path, entry in blip2.q_former_entries(config, shapes).items():
    if path.startswith(f"{root}/visual_attention/"):
      ours = path.replace("/visual_", "/grounding_")
      names = tuple(re.sub(r"\.crossattention\.", ".detection_crossattention.", name) for name in entry.names)
      form = padded if re.search(r"/[kv]/kernel$", path) else entry.form
      entries[ours] = Entry(names, form, shapes[ours].shape[1:], stacked=True)
  local = "perception/local_tokens"
  made = {f"{local}/detection/kernel": np.pad(np.eye(feature, width), ((0, 4), (0, 0))),  # nothing of the box
          f"{local}/detection/bias": np.zeros(width), f"{local}/source": np.zeros((2, width))}
  return entries | {path: Made((), PLAIN, value.shape, value=value.astype(np.float32)) for path, value in made.items()}


def _remedy(path: str, there: tuple[int, ...], needed: tuple[int, ...]) -> str:
  owner = {"vision": "vision", "image_norm": "vision", "llm": "llm", "projection": "llm"}.get(part(path), "mq_former")
  return f"make config.model.{owner} agree with the file"

