"""Grounding-DINO as it was trained: the modules of transformers with the arithmetic of the original code.

transformers takes the logit of reference points with an eps of 1e-5, the original code with an eps of 1e-3. This moves
the hidden states by 0.04 for boxes at the border of the picture. Therefore the loop over the decoder's layers and the
box head are written here, over the submodules of transformers.
"""

import math
import pathlib

import torch
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoDecoder, GroundingDinoDecoderOutput)

from refiner_export.common.settings import UserError, require
from refiner_export.common.weight_files import load_state_dict
from refiner_export.records.features import FEATURE_WIDTH
from refiner_export.refiners.grounding_dino.names import from_official

_EPS = 1e-3  # of the original code's `inverse_sigmoid`


class GroundingDinoModel(GroundingDinoForObjectDetection):
  """Grounding-DINO for inference. Parameters have the names of transformers."""

  def __init__(self, config: GroundingDinoConfig):
    super().__init__(config)
    decoder = _Decoder(config)
    decoder.bbox_embed = self.model.decoder.bbox_embed
    self.model.decoder = decoder

  def forward(
      self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor,
  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Looks for the phrases of captions in pictures of one size.

    Args:
      pixel_values: float32 (B, 3, H, W), normalised, without padding.
      input_ids: int64 (B, T), one caption per picture.
      attention_mask: int64 (B, T), 0 for padding.

    Returns:
      hidden: float32 (B, N, 256), the state of each query after the last layer of the decoder.
      logits: float32 (B, N, T), query against token; -inf for padding.
      boxes: float32 (B, N, 4), cxcywh in [0, 1].
    """
    outputs = self.model(
        pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
    hidden, text = outputs.last_hidden_state, outputs.encoder_last_hidden_state_text
    logits = (hidden @ text.transpose(1, 2)).float().masked_fill(attention_mask[:, None] == 0, float("-inf"))
    # The box of the last layer starts from the reference point that the layer received, not from the one it made.
    reference = outputs.intermediate_reference_points[:, -1]
    boxes = (self.bbox_embed[-1](hidden).float() + inverse_sigmoid(reference)).sigmoid()
    return hidden.float(), logits, boxes


class _Decoder(GroundingDinoDecoder):
  """The loop over the decoder's layers. Every layer refines the boxes to which the next layer attends."""

  def forward(
      self, inputs_embeds, vision_encoder_hidden_states, vision_encoder_attention_mask, text_encoder_hidden_states,
      text_encoder_attention_mask, reference_points, spatial_shapes, spatial_shapes_list, level_start_index,
      valid_ratios, **_,
  ) -> GroundingDinoDecoderOutput:
    """The arguments have the shapes that the method of transformers documents.

    Returns:
      last_hidden_state: (B, N, 256), the normalised state after the last layer.
      intermediate_reference_points: (B, layers, N, 4), the boxes that the layers received.
    """
    hidden, references = inputs_embeds, []
    lowest = torch.finfo(text_encoder_hidden_states.dtype).min
    text_mask = text_encoder_attention_mask[:, None, None].to(text_encoder_hidden_states.dtype) * lowest
    scales = torch.cat([valid_ratios, valid_ratios], dim=-1)[:, None]
    for layer, box_head in zip(self.layers, self.bbox_embed):
      references.append(reference_points)
      level_boxes = reference_points[:, :, None] * scales
      position = self.reference_points_head(_sines(level_boxes[:, :, 0], self.config.d_model // 2))
      hidden = layer(
          hidden_states=hidden, position_embeddings=position, reference_points=level_boxes,
          spatial_shapes=spatial_shapes, spatial_shapes_list=spatial_shapes_list, level_start_index=level_start_index,
          vision_encoder_hidden_states=vision_encoder_hidden_states,
          vision_encoder_attention_mask=vision_encoder_attention_mask,
          text_encoder_hidden_states=text_encoder_hidden_states, text_encoder_attention_mask=text_mask)[0]
      reference_points = (box_head(hidden).float() + inverse_sigmoid(reference_points)).sigmoid()
    return GroundingDinoDecoderOutput(
        last_hidden_state=self.layer_norm(hidden), intermediate_reference_points=torch.stack(references, dim=1))


def inverse_sigmoid(x: torch.Tensor) -> torch.Tensor:
  """log(x / (1 - x)) of numbers in [0, 1]. Numerator and denominator are at least 1e-3."""
  return torch.log(x.clamp(min=_EPS) / (1 - x).clamp(min=_EPS))


def _sines(boxes: torch.Tensor, width: int) -> torch.Tensor:
  """Encodes boxes: (B, N, 4) cxcywh -> (B, N, 4 * width).

  Each of y, x, w and h, in this order, gives `width` numbers: sines and cosines in turn, at wavelengths up to 10000.
  """
  wavelengths = 10_000 ** (2 * (torch.arange(width, device=boxes.device) // 2) / width)
  angles = boxes[:, :, [1, 0, 2, 3], None] * (2 * math.pi) / wavelengths
  return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-3)


def load_pretrained(directory: pathlib.Path) -> GroundingDinoModel:
  """The model of a directory that transformers saved.

  Raises:
    UserError: config.json or model.safetensors is missing or broken, or belongs to another model.
  """
  try:
    config = GroundingDinoConfig.from_pretrained(directory, local_files_only=True)
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"{directory}/config.json: not a configuration of Grounding-DINO: {_one_line(error)}") from None
  return _load(load_state_dict(directory / "model.safetensors"), config, directory)


def load_official(file: pathlib.Path, config: GroundingDinoConfig | None = None) -> GroundingDinoModel:
  """The model of an official checkpoint, such as `groundingdino_swint_ogc.pth`.

  Args:
    file: a file that torch saved.
    config: sizes of the model. None means Grounding-DINO-T.

  Raises:
    UserError: the file holds other weights.
  """
  return _load(from_official(load_state_dict(file), file), config or GroundingDinoConfig(), file)


def _load(weights: dict[str, torch.Tensor], config: GroundingDinoConfig, path: pathlib.Path) -> GroundingDinoModel:
  """The model in float32. The weights have the names of transformers' checkpoints; `path` is for errors."""
  require(config.d_model == FEATURE_WIDTH,
          f"{path}: its queries are {config.d_model} numbers wide, records hold {FEATURE_WIDTH}: name another")
  model, report = GroundingDinoModel.from_pretrained(
      None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True,
      ignore_mismatched_sizes=True)
  # transformers leaves missing weights and weights of another shape at random values.
  faults = {"missing": report["missing_keys"], "of another shape": [name for name, *_ in report["mismatched_keys"]]}
  for fault, names in faults.items():
    require(not names, f"{path}: {len(names)} weights are {fault}, among them {min(names, default='')}: "
                       "it is not a whole Grounding-DINO of this size; get it again")
  return model


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]
