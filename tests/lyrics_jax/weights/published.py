"""Models of transformers of the sizes of a small configuration, random, saved as they are published."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import tiny
import torch
import transformers
from lavis_layout import random_clip, with_noise

from lyrics_jax.config import Config
from lyrics_jax.weights import llama_names
from lyrics_jax.weights.table import Entry


def save_clip(config: Config, directory, text: bool = False, extra_layers: int = 0,
              **saving) -> transformers.CLIPVisionModel:
  """An image encoder, alone or as part of a whole CLIP; returns the encoder."""
  vision = config.stage.model.vision
  if not text and not extra_layers:
    model = random_clip(config)
    model.save_pretrained(directory, **saving)
    return model
  sizes = dict(hidden_size=vision.width, intermediate_size=vision.mlp_dim,
               num_hidden_layers=vision.layers + extra_layers, num_attention_heads=vision.heads,
               image_size=vision.image_size, patch_size=vision.patch_size)
  words = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16,
               bos_token_id=0, eos_token_id=1, pad_token_id=2)
  config = transformers.CLIPConfig(text_config=words, vision_config=sizes, projection_dim=4)
  model = transformers.CLIPModel(config).eval()
  with_noise(model.vision_model)
  model.save_pretrained(directory, **saving)
  return model.vision_model


def llama(config: Config) -> transformers.LlamaForCausalLM:
  llm = config.stage.model.llm
  return with_noise(transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=llm.vocab_size, hidden_size=llm.width, num_hidden_layers=llm.layers, num_attention_heads=llm.heads,
      num_key_value_heads=llm.kv_heads, intermediate_size=llm.mlp_dim, rms_norm_eps=llm.norm_eps,
      rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta}, tie_word_embeddings=False)).eval())


def given(entries: Mapping[str, Entry], parameters: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
  """The tensors that parameters, by path, become, by the names that the entries give them."""
  tensors = {}
  for path, entry in entries.items():
    value = np.asarray(parameters[path])
    for name, layer in zip(entry.names, value if entry.stacked else [value], strict=True):
      tensors[name] = torch.tensor(np.ascontiguousarray(entry.form.give(layer)))
  return tensors


def trained_llama(config: Config, parameters) -> transformers.LlamaForCausalLM:
  """The language model of a run with these parameters, by path, as it was before LoRA: what a user would bring."""
  model = llama(config)
  model.load_state_dict(given(llama_names.entries(tiny.make_plan(config).shapes), parameters))
  return model


def save_bin(model: transformers.PreTrainedModel, directory, shards: int = 1) -> None:
  """As transformers saved models before safetensors."""
  directory = pathlib.Path(directory)
  model.config.save_pretrained(directory)
  items = list(model.state_dict().items())
  if shards == 1:
    torch.save(dict(items), directory / "pytorch_model.bin")
    return
  weight_map = {}
  for n in range(shards):
    file = f"pytorch_model-{n + 1:05}-of-{shards:05}.bin"
    torch.save(dict(items[n::shards]), directory / file)
    weight_map |= {name: file for name, _ in items[n::shards]}
  (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
