"""Where and how the neural parts of a refiner run, and the batches they run on."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch

from refiner_export.common.settings import Settings, require

# Numbers below 1e-38 take a CPU ten times as long (a padded picture in random SAM-HQ ViT-B: 64 s against 6), and zero does
# as well. Said here, before the first product of matrices: threads that run by then would not hear of it.
torch.set_flush_denormal(True)


@dataclasses.dataclass(unsafe_hash=True)
class Compute(Settings):
  """One worker's device.

  Attributes:
    device: `auto` takes this worker's CUDA device if there is one; else what torch calls it, e.g. `cpu` or `cuda:1`.
    precision: of matrix products; `bfloat16` is torch's autocast, weights stay float32.
    compile: run the models through torch.compile. Each picture size is compiled for itself, so it pays only for many
      thousands of pictures of few sizes.
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
    """The module on the device, for inference, compiled if asked."""
    module = module.requires_grad_(False).eval().to(self.torch_device)
    if self.compile:
      torch._dynamo.config.capture_scalar_outputs = True  # else Grounding-DINO's graph breaks at its level sizes
      torch._dynamo.config.recompile_limit = 64  # picture sizes; at the default of 8 torch goes back to plain execution
      module.compile()
    return module

  def autocast(self) -> AbstractContextManager:
    if self.precision == "float32":
      return nullcontext()
    return torch.autocast(self.torch_device.type, torch.bfloat16)

  def batches(self, arrays: Sequence[np.ndarray], size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Groups pictures of exactly the same shape, so that no padding can change a result.

    Args:
      arrays: one array per picture.
      size: how many at most in a batch.

    Yields:
      The positions in `arrays` of a batch, and the batch on the device. Its copy was begun before the batch ahead of
      it was handed out, so that copying and computing overlap.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, array in enumerate(arrays):
      groups.setdefault(array.shape, []).append(position)
    chunks = [group[start:start + size] for group in groups.values() for start in range(0, len(group), size)]
    ahead = None
    for chunk in chunks:
      ahead, ready = (chunk, self._copy([arrays[position] for position in chunk])), ahead
      if ready is not None:
        yield ready
    if ahead is not None:
      yield ahead

  def _copy(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
    batch = torch.from_numpy(np.stack(arrays))
    if self.torch_device.type == "cuda":
      batch = batch.pin_memory()
    return batch.to(self.torch_device, non_blocking=True)
