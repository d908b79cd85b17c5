"""Names of parameters: from the official Grounding-DINO checkpoint to the checkpoints of transformers.

The names on the right-hand side are the names in files such as `IDEA-Research/grounding-dino-tiny`. transformers maps
them to its modules. The names of modules change between versions of transformers; the names in files do not.
"""

import os
import re
from collections.abc import Mapping

import torch

from refiner_export.common.settings import require
from refiner_export.refiners.checkpoints import insert_numbers, prefix_pattern

_SWIN = "model.backbone.conv_encoder.model"
_BLOCK, _SWIN_BLOCK = "backbone.0.layers.*.blocks.*", f"{_SWIN}.encoder.layers.*.blocks.*"
_ENCODER, _DECODER = "model.encoder.layers.*", "model.decoder.layers.*"


def _query_key_value(prefix: str) -> tuple[str, str, str]:
  return f"{prefix}.query", f"{prefix}.key", f"{prefix}.value"


# The beginning of an official name, in whole parts -> the beginning of the new name. The rest of a name stays. `*` is a
# number. With three new names, the matrix is cut into three along its first axis. None means that the detector does not
# need the weight. The first line that fits counts.
_TABLE: dict[str, str | tuple[str, str, str] | None] = {
    "label_enc": None,  # only training uses it
    "bert.pooler": None,  # makes a sentence vector that nothing reads
    "bert.embeddings.position_ids": None,
    "transformer.decoder.bbox_embed": None,  # the same tensors as bbox_embed

    "backbone.0.patch_embed.proj": f"{_SWIN}.embeddings.patch_embeddings.projection",
    "backbone.0.patch_embed.norm": f"{_SWIN}.embeddings.norm",
    f"{_BLOCK}.norm1": f"{_SWIN_BLOCK}.layernorm_before",
    f"{_BLOCK}.attn.qkv": _query_key_value(f"{_SWIN_BLOCK}.attention.self"),
    f"{_BLOCK}.attn.relative_position_bias_table": f"{_SWIN_BLOCK}.attention.self.relative_position_bias_table",
    # This table is not learned. Earlier versions of transformers read it, later ones compute it.
    f"{_BLOCK}.attn.relative_position_index": f"{_SWIN_BLOCK}.attention.self.relative_position_index",
    f"{_BLOCK}.attn.proj": f"{_SWIN_BLOCK}.attention.output.dense",
    f"{_BLOCK}.norm2": f"{_SWIN_BLOCK}.layernorm_after",
    f"{_BLOCK}.mlp.fc1": f"{_SWIN_BLOCK}.intermediate.dense",
    f"{_BLOCK}.mlp.fc2": f"{_SWIN_BLOCK}.output.dense",
    "backbone.0.layers.*.downsample": f"{_SWIN}.encoder.layers.*.downsample",
    "backbone.0.norm1": f"{_SWIN}.hidden_states_norms.stage2",  # transformers counts stages from 1
    "backbone.0.norm2": f"{_SWIN}.hidden_states_norms.stage3",
    "backbone.0.norm3": f"{_SWIN}.hidden_states_norms.stage4",
    "input_proj": "model.input_proj_vision",
    "bert": "model.text_backbone",
    "feat_map": "model.text_projection",

    "transformer.level_embed": "model.level_embed",
    "transformer.encoder.fusion_layers.*.gamma_v": f"{_ENCODER}.fusion_layer.vision_param",
    "transformer.encoder.fusion_layers.*.gamma_l": f"{_ENCODER}.fusion_layer.text_param",
    "transformer.encoder.fusion_layers.*.layer_norm_v": f"{_ENCODER}.fusion_layer.layer_norm_vision",
    "transformer.encoder.fusion_layers.*.layer_norm_l": f"{_ENCODER}.fusion_layer.layer_norm_text",
    "transformer.encoder.fusion_layers.*.attn.v_proj": f"{_ENCODER}.fusion_layer.attn.vision_proj",
    "transformer.encoder.fusion_layers.*.attn.l_proj": f"{_ENCODER}.fusion_layer.attn.text_proj",
    "transformer.encoder.fusion_layers.*.attn.values_v_proj": f"{_ENCODER}.fusion_layer.attn.values_vision_proj",
    "transformer.encoder.fusion_layers.*.attn.values_l_proj": f"{_ENCODER}.fusion_layer.attn.values_text_proj",
    "transformer.encoder.fusion_layers.*.attn.out_v_proj": f"{_ENCODER}.fusion_layer.attn.out_vision_proj",
    "transformer.encoder.fusion_layers.*.attn.out_l_proj": f"{_ENCODER}.fusion_layer.attn.out_text_proj",
    "transformer.encoder.text_layers.*.self_attn.in_proj":
        _query_key_value(f"{_ENCODER}.text_enhancer_layer.self_attn"),
    "transformer.encoder.text_layers.*.self_attn.out_proj": f"{_ENCODER}.text_enhancer_layer.self_attn.out_proj",
    "transformer.encoder.text_layers.*.norm1": f"{_ENCODER}.text_enhancer_layer.layer_norm_before",
    "transformer.encoder.text_layers.*.linear1": f"{_ENCODER}.text_enhancer_layer.fc1",
    "transformer.encoder.text_layers.*.linear2": f"{_ENCODER}.text_enhancer_layer.fc2",
    "transformer.encoder.text_layers.*.norm2": f"{_ENCODER}.text_enhancer_layer.layer_norm_after",
    "transformer.encoder.layers.*.self_attn": f"{_ENCODER}.deformable_layer.self_attn",
    "transformer.encoder.layers.*.norm1": f"{_ENCODER}.deformable_layer.self_attn_layer_norm",
    "transformer.encoder.layers.*.linear1": f"{_ENCODER}.deformable_layer.fc1",
    "transformer.encoder.layers.*.linear2": f"{_ENCODER}.deformable_layer.fc2",
    "transformer.encoder.layers.*.norm2": f"{_ENCODER}.deformable_layer.final_layer_norm",

    "transformer.enc_output": "model.enc_output",
    "transformer.enc_output_norm": "model.enc_output_norm",
    "transformer.enc_out_bbox_embed": "model.encoder_output_bbox_embed",
    "transformer.tgt_embed": "model.query_position_embeddings",
    "transformer.decoder.layers.*.self_attn.in_proj": _query_key_value(f"{_DECODER}.self_attn"),
    "transformer.decoder.layers.*.self_attn.out_proj": f"{_DECODER}.self_attn.out_proj",
    "transformer.decoder.layers.*.norm2": f"{_DECODER}.self_attn_layer_norm",
    "transformer.decoder.layers.*.ca_text.in_proj": _query_key_value(f"{_DECODER}.encoder_attn_text"),
    "transformer.decoder.layers.*.ca_text.out_proj": f"{_DECODER}.encoder_attn_text.out_proj",
    "transformer.decoder.layers.*.catext_norm": f"{_DECODER}.encoder_attn_text_layer_norm",
    "transformer.decoder.layers.*.cross_attn": f"{_DECODER}.encoder_attn",
    "transformer.decoder.layers.*.norm1": f"{_DECODER}.encoder_attn_layer_norm",
    "transformer.decoder.layers.*.linear1": f"{_DECODER}.fc1",
    "transformer.decoder.layers.*.linear2": f"{_DECODER}.fc2",
    "transformer.decoder.layers.*.norm3": f"{_DECODER}.final_layer_norm",
    "transformer.decoder.norm": "model.decoder.layer_norm",
    "transformer.decoder.ref_point_head": "model.decoder.reference_points_head",
    "bbox_embed": "bbox_embed",
}
_RULES = [(prefix_pattern(official), new) for official, new in _TABLE.items()]


def from_official(weights: Mapping[str, torch.Tensor], file: os.PathLike) -> dict[str, torch.Tensor]:
  """The same weights under the names of transformers' checkpoints.

  Args:
    weights: by official names, with or without `module.` before each name.
    file: where the weights come from, for the error.

  Raises:
    UserError: Grounding-DINO has no weights of these names.
  """
  renamed, unknown = {}, []
  for name, tensor in weights.items():
    targets = _rename(name.removeprefix("module."))
    if targets is None:
      unknown.append(name)
    elif targets:
      renamed |= zip(targets, tensor.chunk(len(targets)))
  require(not unknown, f"{file}: {len(unknown)} weights are not Grounding-DINO's, among them "
                       f"{min(unknown, default='')}: name groundingdino_swint_ogc.pth")
  return renamed


def _rename(name: str) -> list[str] | None:
  """The new names of an official name, an empty list for a weight that is not needed, None for an unknown name."""
  name = re.sub(r"in_proj_(weight|bias)$", r"in_proj.\1", name)
  for pattern, new in _RULES:
    match = pattern.fullmatch(name)
    if match is None:
      continue
    *numbers, rest = match.groups(default="")
    if isinstance(new, str):
      new = (new,)
    return [insert_numbers(target, numbers) + rest for target in new or ()]
  return None
