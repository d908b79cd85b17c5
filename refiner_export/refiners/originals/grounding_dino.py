"""Grounding-DINO of the package groundingdino as the detector."""

import dataclasses
import pathlib
from unittest import mock

import torch
from transformers import BatchEncoding, BertConfig, BertModel, BertTokenizer

from refiner_export.refiners.checkpoints import fill, load_state_dict
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.grounding_dino.detector import GroundingDino, GroundingDinoDetector
from refiner_export.refiners.originals import distribution_version, load_package, require_uncompiled
from refiner_export.refiners.grounding_dino.tag_caption import VOCABULARY_REMEDY, load_tokenizer
from refiner_export.common.settings import require

_DISTRIBUTION = "groundingdino-py"
_INSTALL = "Install groundingdino-py==0.4.0 in an environment of its own, as constraints-original.txt says"
_REMEDY = "Name the file groundingdino_swint_ogc.pth of the GroundingDINO project's release (IDEA-Research)"
_MODULES = "", ".models", ".util.slconfig", ".util.get_tokenlizer"
_CONFIG = "config/GroundingDINO_SwinT_OGC.py"
_UNUSED = "label_enc.weight", "bert.embeddings.position_ids"  # in the file; only for training, and a computed table


@dataclasses.dataclass(unsafe_hash=True)
class OriginalGroundingDino(GroundingDino):
  """Grounding-DINO-T as the package groundingdino runs it.

  Attributes are those of `GroundingDino`, but that

    checkpoint: is the official .pth file.
    tokenizer: is a directory with vocab.txt, which this package's version of transformers needs.
  """

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
    """As that of `GroundingDino`, with the package's version."""
    return {**super().describe(), "name": "original_grounding_dino", "package": distribution_version(_DISTRIBUTION)}

  @property
  def _tokenizer_file(self) -> pathlib.Path:
    return pathlib.Path(self.tokenizer) / "vocab.txt"


class OriginalGroundingDinoModel(torch.nn.Module):
  """The package's network with the inputs and outputs of `GroundingDinoModel`.

  A batch gives what the package gives for each of its pictures alone, which is more than the package itself does.

  Attributes:
    config: the package's, of which the detector reads `num_queries` and `max_text_len`.
  """

  def __init__(self, network: torch.nn.Module, config):
    super().__init__()
    self.network, self.config = network, config
    for layer in network.transformer.encoder.text_layers:
      layer.register_forward_pre_hook(_repeat_mask_per_head, with_kwargs=True)

  def forward(
      self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor,
  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Looks for the phrases of a caption in pictures of one size; see `GroundingDinoModel.forward`."""
    caption = BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask,
                             "token_type_ids": torch.zeros_like(input_ids)})
    layers = []
    with self.network.transformer.register_forward_hook(lambda module, inputs, output: layers.append(output[0])):
      outputs = self.network(pixel_values, captions=caption)
    hidden = layers[0][-1]
    logits = outputs["pred_logits"][..., :input_ids.shape[1]]  # the package pads them to 256 tokens
    return hidden.float(), logits.float(), outputs["pred_boxes"].float()


def _repeat_mask_per_head(layer: torch.nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
  """Gives each picture's caption its own mask of which tokens see each other, bool (B, T, T) -> (B * heads, T, T).

  The package would repeat the masks head by head, where torch's attention takes them picture by picture: in a batch of
  different captions, one would be read with the mask of another.
  """
  return inputs, {**keywords, "src_mask": keywords["src_mask"].repeat_interleave(layer.nhead, dim=0)}


def load(checkpoint: str, tokenizer: BertTokenizer) -> OriginalGroundingDinoModel:
  """The package's network with the weights of an official file, on the CPU, in float32.

  Raises:
    UserError: there are no weights, or not exactly those of a Grounding-DINO-T.
  """
  model = build_untrained(tokenizer)
  weights = {name.removeprefix("module."): tensor.float() if tensor.is_floating_point() else tensor  # or an index table
             for name, tensor in load_state_dict(checkpoint).items()}
  fill(model.network, {name: tensor for name, tensor in weights.items() if name not in _UNUSED}, checkpoint, _REMEDY)
  return model


def build_untrained(tokenizer: BertTokenizer) -> OriginalGroundingDinoModel:
  """The package's Grounding-DINO-T with random weights. Raises `UserError` when the package cannot be imported."""
  package, models, configs, text = (
      load_package(f"groundingdino{part}", OriginalGroundingDino.__name__, _INSTALL) for part in _MODULES)
  config = configs.SLConfig.fromfile(str(pathlib.Path(package.__file__).parent / _CONFIG))
  config.use_checkpoint = config.use_transformer_ckpt = False  # they save memory in training
  # The package would fetch BERT by its name; the checkpoint has its weights, and captions come as tokens.
  with mock.patch.multiple(text, get_tokenlizer=lambda name: _Tokens(tokenizer),
                           get_pretrained_language_model=lambda name: BertModel(BertConfig())):
    return OriginalGroundingDinoModel(models.build_model(config), config)


class _Tokens:
  """Stands where the package has its tokenizer: it is given captions that are tokens already."""

  def __init__(self, tokenizer: BertTokenizer):
    self.convert_tokens_to_ids = tokenizer.convert_tokens_to_ids

  def __call__(self, captions: BatchEncoding, **_) -> BatchEncoding:
    return captions
