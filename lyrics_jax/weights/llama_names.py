"""LLaMA in a Hugging Face directory (`LlamaForCausalLM`; Vicuna is one): the names of its weights."""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from lyrics_jax.config import LLMConfig, ModelConfig
from lyrics_jax.weights import lyrics_names
from lyrics_jax.weights.lyrics_names import LANGUAGE_PREFIX
from lyrics_jax.weights.read import read_tensors
from lyrics_jax.weights.sizes import check_fixed, check_sizes, read_settings
from lyrics_jax.weights.table import Source, account
from refiner_export.common.settings import require

SIZES = {"vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
         "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "mlp_dim": "intermediate_size",
         "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}
LEFT_OVER = {"rotary frequencies, computed here": rf"{LANGUAGE_PREFIX}.*\.rotary_emb\.inv_freq"}
_WORDS, _HEAD = f"{LANGUAGE_PREFIX}model.embed_tokens.weight", f"{LANGUAGE_PREFIX}lm_head.weight"


def find(path: epath.Path, config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Source:
  """What the LLaMA weights at `path` have for a model with parameters of these shapes. Raises `UserError`."""
  entries = lyrics_names.entries(config, {name: shape for name, shape in shapes.items() if name.startswith("llm/")})
  require(bool(entries), f"{path}: stage align has no language model; set config.stage=instruct, or leave LLaMA's weights "
                         "out")
  settings = read_settings(path)
  check(path, settings, config.llm)
  tensors = {LANGUAGE_PREFIX + name: tensor for name, tensor in read_tensors(path).items()}
  if settings.get("tie_word_embeddings") and _WORDS in tensors:
    tensors.setdefault(_HEAD, tensors[_WORDS])
  return account(str(path), tensors, entries, "llm".__eq__, remedy, LEFT_OVER)


def check(path: epath.Path, settings: Mapping[str, Any], ours: LLMConfig) -> None:
  """Requires that LLaMA's own config.json agrees with our configuration."""
  rotary = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
  kind = rotary.get("rope_type", rotary.get("type", "default"))
  require(kind == "default", f"{path}: its rotary positions are scaled ({kind}), which is not supported")
  heads = {"num_key_value_heads": settings["num_attention_heads"]} if "num_attention_heads" in settings else {}
  theta = {"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {}
  given = heads | {key: value for key, value in settings.items() if value is not None} | theta
  check_sizes(path, given, ours, "config.model.llm", SIZES)
  check_fixed(path, given, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})


def remedy(path: str, there: tuple[int, ...], needed: tuple[int, ...]) -> str:
  """What to do about a tensor of another shape; see `account`."""
  if path in ("llm/words/embedding", "llm/head/kernel") and there[1:] == needed[1:]:
    return f"set config.model.llm.vocab_size={there[0]}"
  return "make config.model.llm agree with the file"
