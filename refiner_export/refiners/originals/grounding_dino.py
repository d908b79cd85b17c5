"""Grounding-DINO of the package groundingdino as the detector."""

import dataclasses
import pathlib
from typing import ClassVar
from unittest import mock

import torch
from transformers import BatchEncoding, BertConfig, BertModel, BertTokenizer

from refiner_export.common.settings import require
from refiner_export.common.weight_files import load_state_dict
from refiner_export.refiners.checkpoints import fill
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.grounding_dino.detector import GroundingDino, GroundingDinoDetector
from refiner_export.refiners.grounding_dino.tag_caption import VOCABULARY_REMEDY, load_tokenizer
from refiner_export.refiners.originals import distribution_version, load_package, require_uncompiled

_DISTRIBUTION = "groundingdino-py"
_INSTALL = "Install groundingdino-py==0.4.0 in an environment of its own, as constraints-original.txt says"
_REMEDY = "Name the file groundingdino_swint_ogc.pth of the GroundingDINO project's release (IDEA-Research)"
_MODULES = ("groundingdino", "groundingdino.models", "groundingdino.util.slconfig",
            "groundingdino.util.get_tokenlizer")
_CONFIG = "config/GroundingDINO_SwinT_OGC.py"
# Tensors of the file that the package's network does not have: one for training only, and a computed table.
_UNUSED = "label_enc.weight", "bert.embeddings.position_ids"


@dataclasses.dataclass(unsafe_hash=True)
class OriginalGroundingDino(GroundingDino):
  """Settings of Grounding-DINO-T as the package groundingdino runs it.

  Attributes, where they differ from those of `GroundingDino`:
    checkpoint: the official .pth file.
    tokenizer: a directory with vocab.txt. The package's version of transformers needs this file.
  """
  NAME: ClassVar[str] = "original_grounding_dino"

  def check(self, path: str) -> None:
    load_package("groundingdino.models", path, _INSTALL)
    require(pathlib.Path(self.checkpoint).is_file(), f"{path}.checkpoint: {self.checkpoint} is not a file. {_REMEDY}")
    require(self.tokenizer is not None, f"{path}.tokenizer is not set. {VOCABULARY_REMEDY}")
    super().check(path)

  def build(self, compute: Compute) -> GroundingDinoDetector:
    """Loads the model onto the device. Raises `UserError` when the checkpoint is not a whole Grounding-DINO."""
    require_uncompiled(compute)
    tokenizer = load_tokenizer(self._tokenizer_file, BertConfig().vocab_size)
    return GroundingDinoDetector(load(self.checkpoint, tokenizer), tokenizer, self, compute)

  def describe(self) -> dict:
    """As `GroundingDino.describe`, with the version of the package, which decides the detections too."""
    return super().describe() | {"package": distribution_version(_DISTRIBUTION)}

  @property
  def _tokenizer_file(self) -> pathlib.Path:
    return pathlib.Path(self.tokenizer) / "vocab.txt"


class OriginalGroundingDinoModel(torch.nn.Module):
  """The package's network with the inputs and outputs of `GroundingDinoModel`.

  The results do not depend on the other pictures of a batch. In the package alone they do.

  Attributes:
    config: the package's configuration. The detector reads its `num_queries` and `max_text_len`.
  """

  def __init__(self, network: torch.nn.Module, config):
    super().__init__()
    self.network, self.config = network, config
    for layer in network.transformer.encoder.text_layers:
      layer.register_forward_pre_hook(_repeat_mask_per_head, with_kwargs=True)

  def forward(
      self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor,
  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Looks for the phrases of captions in pictures of one size; see `GroundingDinoModel.forward`."""
    caption = BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask,
                             "token_type_ids": torch.zeros_like(input_ids)})
    hidden_states = []  # of all layers of the decoder

    def keep(module, inputs, output):
      hidden_states.extend(output[0])

    with self.network.transformer.register_forward_hook(keep):
      outputs = self.network(pixel_values, captions=caption)
    hidden = hidden_states[-1]
    logits = outputs["pred_logits"][..., :input_ids.shape[1]]  # the package pads them to 256 tokens
    return hidden.float(), logits.float(), outputs["pred_boxes"].float()


def _repeat_mask_per_head(layer: torch.nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
  """Repeats the mask of each caption once per attention head: bool (B, T, T) -> (B * heads, T, T).

  torch's attention expects all heads of the first caption, then all heads of the second one, and so on. The package
  alone repeats the whole batch of masks, which gives some captions the mask of another caption.
  """
  return inputs, {**keywords, "src_mask": keywords["src_mask"].repeat_interleave(layer.nhead, dim=0)}


def load(checkpoint: str, tokenizer: BertTokenizer) -> OriginalGroundingDinoModel:
  """The package's network with the weights of an official file, on the CPU, in float32.

  Raises:
    UserError: the file is missing or holds something else than one whole Grounding-DINO-T.
  """
  model = build_untrained(tokenizer)
  weights = {}
  for name, tensor in load_state_dict(checkpoint).items():
    if tensor.is_floating_point():  # other tensors are index tables
      tensor = tensor.float()
    weights[name.removeprefix("module.")] = tensor
  for name in _UNUSED:
    weights.pop(name, None)
  fill(model.network, weights, checkpoint, _REMEDY)
  return model


def build_untrained(tokenizer: BertTokenizer) -> OriginalGroundingDinoModel:
  """The package's Grounding-DINO-T with random weights. Raises `UserError` when the package cannot be imported."""
  modules = []
  for name in _MODULES:
    modules.append(load_package(name, OriginalGroundingDino.__name__, _INSTALL))
  package, models, configs, text = modules
  config = configs.SLConfig.fromfile(str(pathlib.Path(package.__file__).parent / _CONFIG))
  config.use_checkpoint = config.use_transformer_ckpt = False  # they only save memory in training
  # The package alone downloads BERT and its tokenizer by name. Here the weights of BERT come from the checkpoint, and
  # captions are tokens already.

  def make_tokenizer(name):
    return _Tokens(tokenizer)

  def make_language_model(name):
    return BertModel(BertConfig())

  with mock.patch.multiple(text, get_tokenlizer=make_tokenizer, get_pretrained_language_model=make_language_model):
    return OriginalGroundingDinoModel(models.build_model(config), config)


class _Tokens:
  """Takes the place of the package's tokenizer, for captions that are tokens already."""

  def __init__(self, tokenizer: BertTokenizer):
    self.convert_tokens_to_ids = tokenizer.convert_tokens_to_ids

  def __call__(self, captions: BatchEncoding, **_) -> BatchEncoding:
    return captions
