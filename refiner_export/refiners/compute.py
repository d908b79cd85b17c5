"""Where and how the networks of a refiner run, and the batches they run on."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch

from refiner_export.common.settings import Settings, require

# Numbers below 1e-38 become zero. A CPU takes ten times as long over them (a padded picture in a random SAM-HQ ViT-B:
# 64 s instead of 6 s). This line must come before the first product of matrices: threads that already run ignore it.
torch.set_flush_denormal(True)

_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's RGB values in 0 to 255


@dataclasses.dataclass(unsafe_hash=True)
class Compute(Settings):
  """The device of one worker.

  Attributes:
    device: `auto` takes the worker's CUDA device if there is one. Other values are torch's names, such as `cpu` or
      `cuda:1`.
    precision: of matrix products. `bfloat16` is torch's autocast; the weights stay in float32.
    compile: run the networks through torch.compile. Every picture size is compiled separately, so this pays only for
      many thousands of pictures of few sizes.
  """
  device: str = "auto"
  precision: Literal["float32", "bfloat16"] = "float32"
  compile: bool = False

  def check(self, path: str) -> None:
    require(not self.device.startswith("cuda") or torch.cuda.is_available(),
            f"{path}.device={self.device}: torch sees no CUDA device here; set {path}.device=auto")

  @property
  def torch_device(self) -> torch.device:
    if self.device == "auto":
      return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(self.device)

  def place(self, module: torch.nn.Module) -> torch.nn.Module:
    """The module on the device, ready for inference, and compiled if the settings ask for it."""
    module = module.requires_grad_(False).eval().to(self.torch_device)
    if self.compile:
      torch._dynamo.config.capture_scalar_outputs = True  # otherwise Grounding-DINO's level sizes break its graph
      # torch compiles at most this many picture sizes, then runs uncompiled. Its default is 8.
      torch._dynamo.config.recompile_limit = 64
      module.compile()
    return module

  def autocast(self) -> AbstractContextManager:
    if self.precision == "float32":
      return nullcontext()
    return torch.autocast(self.torch_device.type, torch.bfloat16)

  def batches(self, arrays: Sequence[np.ndarray], size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Groups pictures into batches on the device. All pictures of a batch have the same shape.

    Nothing is padded, because padding would change the results.

    Args:
      arrays: one array per picture.
      size: the most pictures of a batch.

    Yields:
      The positions in `arrays` of the pictures of a batch, and the batch on the device. The copy of the next batch
      begins before this batch is yielded, so that copying and computing overlap.
    """
    ready = None
    for positions in _equal_shapes(arrays, size):
      following = positions, self._copy([arrays[position] for position in positions])
      if ready is not None:
        yield ready
      ready = following
    if ready is not None:
      yield ready

  def _copy(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
    batch = torch.from_numpy(np.stack(arrays))
    if self.torch_device.type == "cuda":
      batch = batch.pin_memory()
    return batch.to(self.torch_device, non_blocking=True)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
  """uint8 (B, H, W, 3) RGB -> float32 (B, 3, H, W) with the mean and the standard deviation of ImageNet."""
  mean = torch.tensor(_MEAN, device=pixels.device)
  std = torch.tensor(_STD, device=pixels.device)
  return ((pixels - mean) / std).permute(0, 3, 1, 2)


def _equal_shapes(arrays: Sequence[np.ndarray], size: int) -> list[list[int]]:
  """Positions of arrays of one shape, at most `size` together. Shapes come in the order of their first array."""
  groups: dict[tuple[int, ...], list[int]] = {}
  for position, array in enumerate(arrays):
    groups.setdefault(array.shape, []).append(position)
  chunks = []
  for group in groups.values():
    for start in range(0, len(group), size):
      chunks.append(group[start:start + size])
  return chunks
