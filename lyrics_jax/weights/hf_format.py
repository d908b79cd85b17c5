"""What an exported directory is made of, whichever model it holds: the base of `lyrics_format` and `llava_format`."""

import abc
import dataclasses
import pathlib
from typing import TYPE_CHECKING, ClassVar

import jax
import numpy as np
from flax import nnx

from lyrics_jax.config import Config
from lyrics_jax.data.batch import Batch, Fields, made_up
from lyrics_jax.models.base import ModelSettings
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD
from lyrics_jax.weights.stored import StoredRun
from lyrics_jax.weights.table import Entry, Shapes
from refiner_export.common.weight_files import Tensor

if TYPE_CHECKING:
  import torch


class HFFormat(abc.ABC):
  """How one run's model becomes a directory that transformers loads, and how the loaded model is compared with ours.

  Args:
    config: of the run.
    apart: whether the language model is left out, but for its LoRA, which becomes an adapter.
  """
  architecture: ClassVar[str]  # the class that transformers loads
  kind: ClassVar[str]  # name of the kind of weights, see `sources.KINDS`

  def __init__(self, config: Config, apart: bool = False):
    self.config, self.model, self.apart = config, config.stage.model, apart

  @classmethod
  @abc.abstractmethod
  def writes(cls, model: ModelSettings) -> bool:
    """Whether models of these settings have this form."""

  @abc.abstractmethod
  def entries(self, shapes: Shapes) -> dict[str, Entry]:
    """Where the parameters lie in model.safetensors. LoRA's parameters are not there."""

  def constants(self) -> dict[str, Tensor]:
    """Tensors, by name, that the class of transformers has and our model lacks."""
    return {}

  @abc.abstractmethod
  def settings(self) -> dict:
    """config.json. Raises `UserError` for a model that the class of transformers cannot be."""

  @abc.abstractmethod
  def write_files(self, directory: pathlib.Path) -> None:
    """Everything but weights, config.json and the model card: processor, tokenizers, code."""

  @abc.abstractmethod
  def card(self, run: StoredRun) -> str:
    """README.md."""

  # --- for `check` ---

  @abc.abstractmethod
  def load(self, directory: pathlib.Path) -> "torch.nn.Module":
    """The exported model in float32."""

  @abc.abstractmethod
  def fields(self) -> Fields:
    """The fields of a batch that both models read."""

  def made_up_batch(self, seed: int = 0) -> Batch:
    """Two random examples of different lengths, each with one picture."""
    return made_up(self.fields(), dataclasses.replace(self.config.dimensions, rows=2, pictures=1), seed)

  def torch_inputs(self, batch: Batch) -> dict[str, "torch.Tensor"]:
    """The batch as tensors. The axis of pictures is left out, and the picture itself becomes `pixel_values`."""
    import torch
    tensors, fields = {}, self.fields()
    for name, value in batch.items():
      value = np.asarray(value)[:, 0] if "pictures" in fields[name].dims else np.asarray(value)
      tensors[name] = torch.from_numpy(value.astype(np.int64) if value.dtype == np.int32 else value)
    tensors.pop("picture_mask", None)
    image = tensors.pop("image").float() / 255
    pixels = (image - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return tensors | {"pixel_values": pixels.permute(0, 3, 1, 2)}

  @abc.abstractmethod
  def jax_outputs(self, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
    """What each part of our model makes of a batch, by part; zero at padding."""

  @abc.abstractmethod
  def torch_outputs(self, model: "torch.nn.Module", batch: Batch) -> dict[str, "torch.Tensor"]:
    """What the exported model makes of the same batch, by the same names. A part that it lacks is missing."""
