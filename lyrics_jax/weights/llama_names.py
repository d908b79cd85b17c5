"""LLaMA in a Hugging Face directory (`LlamaForCausalLM`; Vicuna is one): the names of its weights, and of its LoRA."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from lyrics_jax.models.base import ModelSettings
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.weights.sizes import check_fixed, check_sizes, read_settings
from lyrics_jax.weights.table import Entry, Names, Origin, Shape, Shapes, account
from refiner_export.common.settings import require
from refiner_export.common.weight_files import read_tensors

NAMES = Names(
    "llm",
    parameters={},
    modules={"words": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layers="model.layers",
    layer={"attention_norm": "input_layernorm.", "q": "self_attn.q_proj.", "k": "self_attn.k_proj.",
           "v": "self_attn.v_proj.", "o": "self_attn.o_proj.", "mlp_norm": "post_attention_layernorm.",
           "gate": "mlp.gate_proj.", "up": "mlp.up_proj.", "down": "mlp.down_proj."})
SIZES = {"vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
         "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "mlp_dim": "intermediate_size",
         "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}
ROTARY = "rotary frequencies, computed here"
LEFT_OVER = {ROTARY: r".*\.rotary_emb\.inv_freq"}
ADAPTER, ADAPTER_FILE = "adapter", "adapter_model.safetensors"  # LoRA's directory in an exported one, and PEFT's file
_ADAPTER_PREFIX = "base_model.model."  # PEFT puts this in front of LLaMA's names


def entries(shapes: Shapes, prefix: str = "") -> dict[str, Entry]:
  """Where LLaMA's files have the parameters of the language model. LoRA's parameters are not there."""
  found = NAMES.entries(shapes, prefix)
  for path in list(found):
    if is_lora(path):
      del found[path]
  return found


def adapter_entries(shapes: Shapes) -> dict[str, Entry]:
  """Where PEFT's file has LoRA's parameters; empty for a model without."""
  found = NAMES.entries(shapes, _ADAPTER_PREFIX)
  for path in list(found):
    if not is_lora(path):
      del found[path]
  return found


def is_lora(path: str) -> bool:
  return path.endswith(("/lora_a", "/lora_b"))


def recognises(names: set[str]) -> bool:
  """Whether a file with tensors of these names holds a LLaMA."""
  return any(name.startswith("model.layers.") for name in names)


def find(path: epath.Path, model: ModelSettings, shapes: Shapes) -> Origin:
  """What the LLaMA weights at `path` have for a model with parameters of these shapes. Raises `UserError`."""
  ours = entries(shapes)
  require(bool(ours), f"{path}: this model has no language model; leave LLaMA's weights out")
  settings = read_settings(path)
  check(path, settings, model.llm)
  tensors = read_tensors(path)
  words, head = "model.embed_tokens.weight", "lm_head.weight"
  if settings.get("tie_word_embeddings") and words in tensors:
    tensors.setdefault(head, tensors[words])
  return account(str(path), tensors, ours, "llm".__eq__, remedy, LEFT_OVER)


def check(path: epath.Path, settings: Mapping[str, Any], llm: LlamaSettings) -> None:
  """Requires that the config.json of LLaMA agrees with our settings."""
  rotary = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
  kind = rotary.get("rope_type", rotary.get("type", "default"))
  require(kind == "default", f"{path}: its rotary positions are scaled ({kind}), which is not supported")
  given = {}
  if "num_attention_heads" in settings:
    given["num_key_value_heads"] = settings["num_attention_heads"]  # unless it says otherwise
  for key, value in settings.items():
    if value is not None:
      given[key] = value
  if "rope_theta" in rotary:
    given["rope_theta"] = rotary["rope_theta"]
  check_sizes(path, given, llm, "config.stage.model.llm", SIZES)
  check_fixed(path, given, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})


def remedy(path: str, there: Shape, needed: Shape) -> str:
  """What to do about a tensor of another shape; see `account`."""
  if path in ("llm/words/embedding", "llm/head/kernel") and there[1:] == needed[1:]:
    return f"set config.stage.model.llm.vocab_size={there[0]}"
  return "make config.stage.model.llm agree with the file"
