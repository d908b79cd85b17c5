"""LoRA (Hu et al. 2021): a linear map with a trained low-rank addition, y = x W + (alpha / r) dropout(x) A B."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lyrics_jax.config import LoRAConfig
from lyrics_jax.models.layers import (LINEAR, Array, Linear, LogicalAxes, dropout, parameter, product_from_heads,
                                      product_to_heads)

# PEFT's initialisation of A: Kaiming uniform with a = sqrt(5), i.e. uniform within 1 / sqrt(fan_in).
_init_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LoRALinear(Linear):
  """A `Linear` without bias plus adapters `lora_a` [n, r] and `lora_b` [r, m] (zero at the start)."""

  def __init__(self, n: int, m: int, axes: LogicalAxes, config: LoRAConfig, *, rngs: nnx.Rngs, int8: bool = False):
    super().__init__(n, m, axes, bias=False, rngs=rngs, int8=int8)
    self.lora_a = parameter(rngs, _init_a, (n, config.rank), (axes[0], None))
    self.lora_b = parameter(rngs, jax.nn.initializers.zeros, (config.rank, m), (None, axes[1]))
    self.scale, self.rate = config.alpha / config.rank, config.dropout

  def __call__(self, x: Array, key: Array | None = None) -> Array:
    low = dropout(x, self.rate, key) @ self.lora_a[...].astype(x.dtype)
    return self._sum(super().__call__(x), low @ self.lora_b[...].astype(x.dtype))

  def to_heads(self, x: Array, heads: int, key: Array | None = None) -> Array:
    low = dropout(x, self.rate, key) @ self.lora_a[...].astype(x.dtype)
    return self._sum(super().to_heads(x, heads), product_to_heads(low, self.lora_b[...], heads))

  def from_heads(self, x: Array, key: Array | None = None) -> Array:
    low = product_from_heads(dropout(x, self.rate, key), self.lora_a[...])
    return self._sum(super().from_heads(x), low @ self.lora_b[...].astype(x.dtype))

  def _sum(self, frozen: Array, adapted: Array) -> Array:
    return checkpoint_name(frozen + self.scale * adapted, LINEAR)
