"""RAM++ of the package ram as the tagger.

The package is on no package index. This module was written from the package's source code and has never run with the
package. Tests run it with a stand-in that has the same interface.
"""

import dataclasses
from typing import ClassVar
from unittest import mock

import torch

from refiner_export.refiners.checkpoints import fill
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.originals import distribution_version, load_package, require_uncompiled
from refiner_export.refiners.ram_plus.model import RamPlusModel
from refiner_export.refiners.ram_plus.tagger import RamPlus, RamPlusTagger

_DISTRIBUTION = "ram"
_MODULE = "ram.models.ram_plus"
_INSTALL = ("Install it from the recognize-anything project's repository, beside transformers before 4.48; what pip "
            "finds by the name ram is something else")
_BERT_TOKENS = 30_524  # BERT's 30,522 and two more


@dataclasses.dataclass(unsafe_hash=True)
class OriginalRamPlus(RamPlus):
  """Settings of RAM++ as the package ram runs it. The attributes are those of `RamPlus`."""
  NAME: ClassVar[str] = "original_ram_plus"

  def check(self, path: str) -> None:
    load_package(_MODULE, path, _INSTALL)
    super().check(path)

  def build(self, compute: Compute) -> RamPlusTagger:
    """Loads the model onto the device. Raises `UserError` when the files do not belong to one whole RAM++."""
    require_uncompiled(compute)
    tagger = super().build(compute)
    network = load(tagger.model, self.backbone, self.checkpoint)
    model = OriginalRamPlusModel(network, tagger.model.config)
    return RamPlusTagger(model, tagger.names, tagger.thresholds, self.batch, compute)

  def describe(self) -> dict:
    """As `RamPlus.describe`, with the version of the package, which decides the tags too."""
    return super().describe() | {"package": distribution_version(_DISTRIBUTION)}


class OriginalRamPlusModel(torch.nn.Module):
  """The package's network with the inputs, the outputs and the `config` of `RamPlusModel`."""

  def __init__(self, network: torch.nn.Module, config):
    super().__init__()
    self.network, self.config = network, config

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, image_size, image_size), normalised -> float32 (B, tags), logits."""
    logits = []

    def keep(module, inputs, output):
      logits.append(output)

    with self.network.fc.register_forward_hook(keep):
      self.network.generate_tag(images)  # returns words without their scores
    return logits[0][..., 0].float()


def load(model: RamPlusModel, backbone: str, checkpoint: str) -> torch.nn.Module:
  """The package's network with the weights of this project's model. Both share the same tensors.

  Args:
    model: this project's model with the weights of the checkpoint. Its parameters have the official names.
    backbone: size of the image encoder.
    checkpoint: the file of the weights, for the error.

  Raises:
    UserError: the package's network has other sizes than the checkpoint.
  """
  package = load_package(_MODULE, OriginalRamPlus.__name__, _INSTALL)

  # The package alone downloads BERT's tokenizer, makes embeddings for its tokens, and then deletes the embeddings.
  def make_tokenizer(*_):
    return range(_BERT_TOKENS)

  with mock.patch.object(package, "init_tokenizer", make_tokenizer):
    network = package.RAM_plus(image_size=model.config.swin.image_size, vit=backbone)
  network = network.to(next(model.parameters()).device)
  weights = model.state_dict()
  stored = network.state_dict()
  for name, table in network.named_buffers():
    if name in stored:  # a computed table, which this project's model does not store
      weights.setdefault(name, table)
  fill(network, weights, checkpoint, "Name the file that the installed package ram was made for")
  return network
