"""RAM++ of the package ram as the tagger.

The package is on no package index. This module was written after its source and has never been run against it: tests
hold it to a stand-in with the same interface.
"""

import dataclasses
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
_BERT_TOKENS = 30_524  # BERT's and two more


@dataclasses.dataclass(unsafe_hash=True)
class OriginalRamPlus(RamPlus):
  """RAM++ as the package ram runs it; attributes are those of `RamPlus`."""

  def check(self, path: str) -> None:
    load_package(_MODULE, path, _INSTALL)
    super().check(path)

  def build(self, compute: Compute) -> RamPlusTagger:
    """Loads the model onto the device. Raises `UserError` when the files are not those of one whole RAM++."""
    require_uncompiled(compute)
    own = super().build(compute)
    model = OriginalRamPlusModel(load(own.model, self.backbone, self.checkpoint), own.model.config)
    return RamPlusTagger(model, own.names, own.thresholds, self.batch, compute)

  def describe(self) -> dict:
    """As that of `RamPlus`, with the package's version."""
    return {**super().describe(), "name": "original_ram_plus", "package": distribution_version(_DISTRIBUTION)}


class OriginalRamPlusModel(torch.nn.Module):
  """The package's network with the inputs and outputs of `RamPlusModel`, whose `config` it has."""

  def __init__(self, network: torch.nn.Module, config):
    super().__init__()
    self.network, self.config = network, config

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, image_size, image_size), normalised -> float32 (B, tags), a logit of each tag."""
    logits = []
    with self.network.fc.register_forward_hook(lambda module, inputs, output: logits.append(output)):
      self.network.generate_tag(images)  # which itself gives words without their scores
    return logits[0][..., 0].float()


def load(own: RamPlusModel, backbone: str, checkpoint: str) -> torch.nn.Module:
  """The package's network with the weights of this project's model, which it shares.

  Args:
    own: has read and checked the checkpoint; its parameters have the official names.
    backbone: size of the image encoder.
    checkpoint: where the weights come from, for the error.

  Raises:
    UserError: the package's model is another one, by its sizes.
  """
  package = load_package(_MODULE, OriginalRamPlus.__name__, _INSTALL)
  # The package would fetch BERT's tokenizer to know its length, and then delete the embeddings that it was wanted for.
  with mock.patch.object(package, "init_tokenizer", lambda *_: range(_BERT_TOKENS)):
    network = package.RAM_plus(image_size=own.config.swin.image_size, vit=backbone)
  network = network.to(next(own.parameters()).device)
  stored = network.state_dict().keys()  # with tables that files have too, and that the checkpoint's reader leaves out
  computed = {name: table for name, table in network.named_buffers() if name in stored}
  fill(network, computed | own.state_dict(), checkpoint, "Name the file that the installed package ram was made for")
  return network
