"""Our settings in Hugging Face's words: pieces of the JSON files of an exported directory.

They are plain dictionaries, in names that transformers 4.57 and 5 both read. The classes of transformers would write
the form of the version that is installed.
"""

from lyrics_jax.data.tokenizers import LLMTokenizer
from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.weights import llama_names

MAX_NEW_TOKENS = 96  # of an answer, where a generation says nothing else


def vision_settings(vision: ViTSettings) -> dict:
  """`CLIPVisionConfig` of an image encoder that has as many layers as run."""
  return {"model_type": "clip_vision_model", "image_size": vision.image_size, "patch_size": vision.patch_size,
          "hidden_size": vision.width, "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads,
          "intermediate_size": vision.mlp_dim, "layer_norm_eps": vision.norm_eps, "hidden_act": vision.activation}


def llama_settings(llm: LlamaSettings) -> dict:
  """`LlamaConfig`."""
  return {"model_type": "llama", "vocab_size": llm.vocab_size, "hidden_size": llm.width,
          "num_hidden_layers": llm.layers, "num_attention_heads": llm.heads, "num_key_value_heads": llm.kv_heads,
          "head_dim": llm.width // llm.heads, "intermediate_size": llm.mlp_dim, "rope_theta": llm.rope_theta,
          "rms_norm_eps": llm.norm_eps, "max_position_embeddings": llm.max_positions, "tie_word_embeddings": False}


def generation_settings(tokenizer: LLMTokenizer) -> dict:
  """`generation_config.json`: greedy decoding, as in evaluation."""
  return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad,
          "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}


def adapter_settings(lora: LoRASettings) -> dict:
  """`adapter_config.json` of PEFT."""
  targets = []
  for name in lora.targets:
    targets.append(llama_names.NAMES.layer[name].split(".")[-2])
  return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha,
          "lora_dropout": lora.dropout, "bias": "none", "inference_mode": True, "base_model_name_or_path": None,
          "target_modules": targets}
