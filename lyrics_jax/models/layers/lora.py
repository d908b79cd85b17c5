"""LoRA (Hu et al. 2021): a linear map with a trained low-rank addition, y = x W + (alpha / r) dropout(x) A B."""

import dataclasses
from typing import Literal

import jax
from flax import nnx

from lyrics_jax.models.layers.dropout import dropout
from lyrics_jax.models.layers.linear import Linear, product_from_heads, product_to_heads
from lyrics_jax.models.layers.parameter import Array, LogicalAxes, parameter, zeros
from lyrics_jax.models.layers.remat import LINEAR, named
from refiner_export.common.checks import below_one
from refiner_export.common.settings import Settings, require

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]

# PEFT initialises A by Kaiming uniform with a = sqrt(5), which is uniform within 1 / sqrt(fan_in).
_init_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(unsafe_hash=True)
class LoRASettings(Settings):
  """Low-rank adapters, scaled by alpha / rank; B starts at zero."""
  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.05
  targets: tuple[Projection, ...] = ("q", "v")

  def check(self, path: str) -> None:
    require(self.rank > 0, f"{path}.rank={self.rank} must be positive")
    below_one(self, path, "dropout")
    require(bool(self.targets), f"{path}.targets is empty: name a projection, or set {path}=None")


class LoRALinear(Linear):
  """A `Linear` without bias, and adapters `lora_a` [n, r] and `lora_b` [r, m]."""

  def __init__(self, n: int, m: int, axes: LogicalAxes, settings: LoRASettings, *, rngs: nnx.Rngs, int8: bool = False,
               to_heads: int | None = None, from_heads: int | None = None):
    super().__init__(n, m, axes, bias=False, rngs=rngs, int8=int8, to_heads=to_heads, from_heads=from_heads)
    self.lora_a = parameter(rngs, _init_a, (n, settings.rank), (axes[0], None))
    self.lora_b = parameter(rngs, zeros, (settings.rank, m), (None, axes[1]))
    self.scale, self.rate = settings.alpha / settings.rank, settings.dropout

  def __call__(self, x: Array, key: Array | None = None) -> Array:
    a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
    dropped = dropout(x, self.rate, key)
    low = dropped @ a if self.from_heads is None else product_from_heads(dropped, a)
    adapted = low @ b if self.to_heads is None else product_to_heads(low, b.T, self.to_heads)
    return named(super().__call__(x) + self.scale * adapted, LINEAR)
