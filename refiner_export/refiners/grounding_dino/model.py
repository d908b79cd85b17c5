"""Grounding-DINO as it was trained: transformers' modules with the original's arithmetic, and its weights from disk.

transformers takes the logit of reference points with eps 1e-5 where the original code takes `inverse_sigmoid` with
1e-3. For boxes at the picture's border that moves the hidden states by 0.04; so the decoder's loop and the box head are
written here, over the same submodules.
"""

import math
import pathlib

import torch
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoDecoder, GroundingDinoDecoderOutput)

from refiner_export.records.record import FEATURE_WIDTH
from refiner_export.refiners.checkpoints import load_state_dict
from refiner_export.refiners.grounding_dino.names import from_official
from refiner_export.common.settings import UserError, require

_EPS = 1e-3


class GroundingDinoModel(GroundingDinoForObjectDetection):
  """Grounding-DINO for inference; parameters are named as in transformers."""

  def __init__(self, config: GroundingDinoConfig):
    super().__init__(config)
    decoder = _Decoder(config)
    decoder.bbox_embed = self.model.decoder.bbox_embed
    self.model.decoder = decoder

  def forward(
      self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor,
  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Looks for the phrases of a caption in pictures of one size.

    Args:
      pixel_values: float32 (B, 3, H, W), normalised, without padding.
      input_ids: int64 (B, T).
      attention_mask: int64 (B, T), 0 for padding.

    Returns:
      hidden: float32 (B, N, 256), the decoder's last state of each query.
      logits: float32 (B, N, T), query against token; -inf for padding.
      boxes: float32 (B, N, 4), cxcywh in [0, 1].
    """
    outputs = self.model(
        pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
    hidden, text = outputs.last_hidden_state, outputs.encoder_last_hidden_state_text
    logits = (hidden @ text.transpose(1, 2)).float().masked_fill(attention_mask[:, None] == 0, float("-inf"))
    # The last layer's box starts from the reference that this layer was given, not from the one it made.
    reference = outputs.intermediate_reference_points[:, -1]
    boxes = (self.bbox_embed[-1](hidden).float() + inverse_sigmoid(reference)).sigmoid()
    return hidden.float(), logits, boxes


class _Decoder(GroundingDinoDecoder):
  """The loop over the decoder's layers; each refines the boxes that the next one looks at."""

  def forward(
      self, inputs_embeds, vision_encoder_hidden_states, vision_encoder_attention_mask, text_encoder_hidden_states,
      text_encoder_attention_mask, reference_points, spatial_shapes, spatial_shapes_list, level_start_index,
      valid_ratios, **_,
  ) -> GroundingDinoDecoderOutput:
    """Shapes are those of transformers' method.

    Returns:
      The normalised state after the last layer, (B, N, 256), and the boxes each layer was given, (B, layers, N, 4).
    """
    hidden, references = inputs_embeds, []
    lowest = torch.finfo(text_encoder_hidden_states.dtype).min
    text_mask = text_encoder_attention_mask[:, None, None].to(text_encoder_hidden_states.dtype) * lowest
    scales = torch.cat([valid_ratios, valid_ratios], dim=-1)[:, None]
    for layer, box_head in zip(self.layers, self.bbox_embed):
      references.append(reference_points)
      of_levels = reference_points[:, :, None] * scales
      position = self.reference_points_head(_sines(of_levels[:, :, 0], self.config.d_model // 2))
      hidden = layer(
          hidden_states=hidden, position_embeddings=position, reference_points=of_levels,
          spatial_shapes=spatial_shapes, spatial_shapes_list=spatial_shapes_list, level_start_index=level_start_index,
          vision_encoder_hidden_states=vision_encoder_hidden_states,
          vision_encoder_attention_mask=vision_encoder_attention_mask,
          text_encoder_hidden_states=text_encoder_hidden_states, text_encoder_attention_mask=text_mask)[0]
      reference_points = (box_head(hidden).float() + inverse_sigmoid(reference_points)).sigmoid()
    return GroundingDinoDecoderOutput(
        last_hidden_state=self.layer_norm(hidden), intermediate_reference_points=torch.stack(references, dim=1))


def inverse_sigmoid(x: torch.Tensor) -> torch.Tensor:
  """log(x / (1 - x)) of numbers in [0, 1], numerator and denominator not below 1e-3."""
  return torch.log(x.clamp(min=_EPS) / (1 - x).clamp(min=_EPS))


def _sines(boxes: torch.Tensor, width: int) -> torch.Tensor:
  """(B, N, 4) cxcywh -> (B, N, 4 * width): sines and cosines, in turn, of y, x, w, h at wavelengths up to 10000."""
  wavelengths = 10_000 ** (2 * (torch.arange(width, device=boxes.device) // 2) / width)
  angles = boxes[:, :, [1, 0, 2, 3], None] * (2 * math.pi) / wavelengths
  return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-3)


def load_pretrained(directory: pathlib.Path) -> GroundingDinoModel:
  """The model of a directory that transformers saved: config.json and model.safetensors. Raises `UserError`."""
  try:
    config = GroundingDinoConfig.from_pretrained(directory, local_files_only=True)
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"{directory}/config.json: not a configuration of Grounding-DINO: {_one_line(error)}") from None
  return _load(load_state_dict(directory / "model.safetensors"), config, directory)


def load_official(file: pathlib.Path, config: GroundingDinoConfig | None = None) -> GroundingDinoModel:
  """The model of an official checkpoint, `groundingdino_swint_ogc.pth`.

  Args:
    file: what torch saved.
    config: the model's sizes; those of Grounding-DINO-T when left out.

  Raises:
    UserError: the file holds other weights.
  """
  return _load(from_official(load_state_dict(file), file), config or GroundingDinoConfig(), file)


def _load(weights: dict[str, torch.Tensor], config: GroundingDinoConfig, path: pathlib.Path) -> GroundingDinoModel:
  """The model with these weights, under the names of transformers' checkpoints, in float32."""
  require(config.d_model == FEATURE_WIDTH,
          f"{path}: its queries are {config.d_model} numbers wide, records hold {FEATURE_WIDTH}: name another")
  model, report = GroundingDinoModel.from_pretrained(
      None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True,
      ignore_mismatched_sizes=True)
  # transformers would leave all these random.
  faults = {"missing": report["missing_keys"], "of another shape": [name for name, *_ in report["mismatched_keys"]]}
  for fault, names in faults.items():
    require(not names, f"{path}: {len(names)} weights are {fault}, among them {min(names, default='')}: "
                       "it is not a whole Grounding-DINO of this size; get it again")
  return model


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]
