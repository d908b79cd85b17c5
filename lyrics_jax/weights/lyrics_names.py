"""The names of our parameters in an exported directory: one table, read in both directions.

An exported directory is laid out so that its parts have the names of the published ones: `vision_model.*` as in
CLIP's files, `language_model.*` as in LLaMA's with that prefix, and the adapter in `adapter/` as PEFT writes it. The
MQ-Former, which nobody else has, keeps the names it has here, one module per layer in place of the stacks that JAX
scans over.

    DIR/model.safetensors, or shards and their index    `entries`
    DIR/adapter/adapter_model.safetensors               `adapter_entries`; only where LoRA was not merged
    DIR/training/config.json, manifest.json             the run's own configuration, and the manifest of its records
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from lyrics_jax.config import ModelConfig
from lyrics_jax.weights.table import Entry, Form
from lyrics_jax.models.quantised import SCALE

ADAPTER, TRAINING = "adapter", "training"  # directories inside an exported one
ADAPTER_FILE = "adapter_model.safetensors"
VISION_PREFIX, LANGUAGE_PREFIX = "vision_model.", "language_model."  # in front of CLIP's and LLaMA's own names
_ADAPTER_PREFIX = "base_model.model."  # PEFT's, in front of LLaMA's own names


@dataclasses.dataclass(frozen=True)
class TwoWay(Form):
  """A `Form` with its inverse: `give` makes what lies in the file from ours."""
  give: Callable[[np.ndarray], np.ndarray]


def _patch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  return (shape[1], 3, *[math.isqrt(shape[0] // 3)] * 2)


_PLAIN = TwoWay(lambda shape: shape, lambda a: a, lambda a: a)
_TRANSPOSED = TwoWay(lambda shape: shape[::-1], lambda a: a.T, lambda a: a.T)
_PATCH = TwoWay(_patch_shape,  # [D, 3, p, p] <-> [p * p * 3, D]
                lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
                lambda a: a.T.reshape(a.shape[1], *_patch_shape(a.shape)[2:], 3).transpose(0, 3, 1, 2))

_LEAVES = {"kernel": ("weight", _TRANSPOSED), "weight": ("weight", _PLAIN), "embedding": ("weight", _PLAIN),
           "scale": ("weight", _PLAIN), "bias": ("bias", _PLAIN), "lora_a": ("lora_A.weight", _TRANSPOSED),
           "lora_b": ("lora_B.weight", _TRANSPOSED)}

# --- our single parameters, and modules outside stacks, where the name is not ours with dots for slashes ---
_PARAMETERS = {
    "perception/vision/patch/kernel": (f"{VISION_PREFIX}embeddings.patch_embedding.weight", _PATCH),
    "perception/vision/class_token": (f"{VISION_PREFIX}embeddings.class_embedding", _PLAIN),
    "perception/vision/positions": (f"{VISION_PREFIX}embeddings.position_embedding.weight", _PLAIN),
    "perception/local_tokens/source": ("local_tokens.source", _PLAIN),
    "perception/mq_former/queries": ("mq_former.queries", _PLAIN),
    "temperature": ("temperature", _PLAIN),
}
_MODULES = {
    "perception/vision/patch": f"{VISION_PREFIX}embeddings.patch_embedding",
    "perception/vision/input_norm": f"{VISION_PREFIX}pre_layrnorm",  # CLIP's own spelling
    "llm/words": f"{LANGUAGE_PREFIX}model.embed_tokens",
    "llm/norm": f"{LANGUAGE_PREFIX}model.norm",
    "llm/head": f"{LANGUAGE_PREFIX}lm_head",
}

# --- modules of the layers ---
_CLIP_LAYER = {"attention_norm": "layer_norm1", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
               "v": "self_attn.v_proj", "o": "self_attn.out_proj", "mlp_norm": "layer_norm2", "up": "mlp.fc1",
               "down": "mlp.fc2"}
LLAMA_LAYER = {"attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
               "v": "self_attn.v_proj", "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
               "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def entries(config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Entry]:
  """Where in the model's own files each parameter lies; LoRA's are not there, nor the scales of int8 kernels.

  Args:
    config: of the run whose parameters they are.
    shapes: `ParameterPlan.shapes`, or a part of it.
  """
  return {path: _entry(path, shape.shape, config) for path, shape in shapes.items()
          if not is_lora(path) and not path.endswith(SCALE)}


def adapter_entries(config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Entry]:
  """Where in `adapter_model.safetensors` LoRA's parameters lie; empty for a run without."""
  return {path: _entry(path, shape.shape, config) for path, shape in shapes.items() if is_lora(path)}


def is_lora(path: str) -> bool:
  return path.endswith(("/lora_a", "/lora_b"))


def _entry(path: str, shape: tuple[int, ...], config: ModelConfig) -> Entry:
  if path in _PARAMETERS:
    name, form = _PARAMETERS[path]
    return Entry((name,), form, shape)
  module, _, leaf = path.rpartition("/")
  suffix, form = _LEAVES[leaf]
  if "/stack/blocks/" not in module:
    name = _MODULES.get(module, module.removeprefix("perception/").replace("/", "."))
    return Entry((f"{name}.{suffix}",), form, shape)
  names = tuple(f"{layer}.{suffix}" for layer in _layers(module, config))
  if leaf.startswith("lora_"):
    names = tuple(_ADAPTER_PREFIX + name.removeprefix(LANGUAGE_PREFIX) for name in names)
  return Entry(names, form, shape[1:], stacked=True)


def _layers(module: str, config: ModelConfig) -> list[str]:
  """The module of each layer that a module of a stack holds, in the stack's order."""
  owner, inner = module.split("/stack/blocks/")
  if owner == "perception/vision":
    return [f"{VISION_PREFIX}encoder.layers.{n}.{_CLIP_LAYER[inner]}" for n in range(config.vision.layers)]
  if owner == "llm":
    return [f"{LANGUAGE_PREFIX}model.layers.{n}.{LLAMA_LAYER[inner]}" for n in range(config.llm.layers)]
  place, inner = re.fullmatch(r"layers/(\d+)/(.*)", inner).groups()  # the layer's place in its group
  numbers = range(int(place), config.mq_former.layers, config.mq_former.cross_attention_frequency)
  return [f"mq_former.layers.{n}.{inner.replace('/', '.')}" for n in numbers]
