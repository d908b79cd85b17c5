"""Turns a file that transformers saved into an official checkpoint of the Grounding-DINO project.

The table was written from the official modules. It does not use the exporter's table, which goes the other way.
"""

import pathlib
import re

import torch
from safetensors.torch import load_file

_LAYER = {  # name in transformers of a part of a layer -> official name
    "fusion_layer": {"vision_param": "gamma_v", "text_param": "gamma_l", "layer_norm_vision": "layer_norm_v",
                     "layer_norm_text": "layer_norm_l", "vision_proj": "v_proj", "text_proj": "l_proj",
                     "values_vision_proj": "values_v_proj", "values_text_proj": "values_l_proj",
                     "out_vision_proj": "out_v_proj", "out_text_proj": "out_l_proj"},
    "text_enhancer_layer": {"layer_norm_before": "norm1", "fc1": "linear1", "fc2": "linear2",
                            "layer_norm_after": "norm2"},
    "deformable_layer": {"self_attn_layer_norm": "norm1", "fc1": "linear1", "fc2": "linear2",
                         "final_layer_norm": "norm2"},
    "decoder": {"encoder_attn_layer_norm": "norm1", "self_attn_layer_norm": "norm2", "final_layer_norm": "norm3",
                "encoder_attn_text_layer_norm": "catext_norm", "encoder_attn_text": "ca_text",
                "encoder_attn": "cross_attn", "fc1": "linear1", "fc2": "linear2"},
    "swin": {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention": "attn", "intermediate": "mlp.fc1",
             "self": "", "dense": ""},
}
_LISTS = {"fusion_layer": "fusion_layers", "text_enhancer_layer": "text_layers", "deformable_layer": "layers"}
_TOP = {"model.input_proj_vision": "input_proj", "model.text_backbone": "bert", "model.text_projection": "feat_map",
        "model.query_position_embeddings": "transformer.tgt_embed", "model.level_embed": "transformer.level_embed",
        "model.enc_output": "transformer.enc_output", "model.enc_output_norm": "transformer.enc_output_norm",
        "model.encoder_output_bbox_embed": "transformer.enc_out_bbox_embed",
        "model.decoder.layer_norm": "transformer.decoder.norm",
        "model.decoder.reference_points_head": "transformer.decoder.ref_point_head"}
_BACKBONE = "model.backbone.conv_encoder.model."


def official_weights(directory: pathlib.Path, decoder_layers: int) -> dict[str, torch.Tensor]:
  """The state_dict of the official module, and the other tensors of the released file."""
  weights, fused = {}, {}
  for name, tensor in load_file(directory / "model.safetensors").items():
    if name.startswith("bbox_embed.0."):  # one head, which the file lists once per layer and again in the decoder
      rest = name.removeprefix("bbox_embed.0.")
      for layer in range(decoder_layers):
        weights[f"bbox_embed.{layer}.{rest}"] = weights[f"transformer.decoder.bbox_embed.{layer}.{rest}"] = tensor
    elif "swin.layernorm" not in name:  # only transformers has this norm, and nothing reads it
      *path, part, kind = name.split(".")
      if part in ("query", "key", "value") and "text_backbone" not in name:
        fused.setdefault((".".join(path), kind), {})[part] = tensor
      else:
        weights[_official(name)] = tensor
  for (path, kind), parts in fused.items():
    together = torch.cat([parts["query"], parts["key"], parts["value"]])
    weights[f"{_official(path)}.qkv.{kind}" if "backbone" in path else f"{_official(path)}.in_proj_{kind}"] = together
  width = weights["bert.embeddings.word_embeddings.weight"].shape[1]
  weights |= {"bert.pooler.dense.weight": torch.ones(width, width), "bert.pooler.dense.bias": torch.ones(width),
              "bert.embeddings.position_ids": torch.arange(512)[None], "label_enc.weight": torch.ones(2001, 256)}
  for name in [name for name in weights if name.endswith("relative_position_bias_table")]:
    weights[name.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
  return weights


def save_official(weights: dict[str, torch.Tensor], file: pathlib.Path) -> pathlib.Path:
  torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}}, file)
  return file


def _official(name: str) -> str:
  if name.startswith(_BACKBONE):
    return f"backbone.0.{_swin(name.removeprefix(_BACKBONE))}"
  if layer := re.match(r"model\.encoder\.layers\.(\d+)\.(\w+)\.(.+)", name):
    number, kind, rest = layer.groups()
    return f"transformer.encoder.{_LISTS[kind]}.{number}.{_parts(rest, _LAYER[kind])}"
  if layer := re.match(r"model\.decoder\.layers\.(\d+)\.(.+)", name):
    return f"transformer.decoder.layers.{layer[1]}.{_parts(layer[2], _LAYER['decoder'])}"
  head = next(head for head in _TOP if name == head or name.startswith(f"{head}."))
  return _TOP[head] + name.removeprefix(head)


def _swin(name: str) -> str:
  if stage := re.match(r"hidden_states_norms\.stage(\d)\.(\w+)", name):
    return f"norm{int(stage[1]) - 1}.{stage[2]}"
  name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
  name = name.replace("embeddings.norm", "patch_embed.norm").removeprefix("encoder.")
  name = name.replace("attention.output.dense", "attn.proj").replace(".output.dense", ".mlp.fc2")
  return _parts(name, _LAYER["swin"])


def _parts(name: str, table: dict[str, str]) -> str:
  return ".".join(part for part in (table.get(part, part) for part in name.split(".")) if part)
