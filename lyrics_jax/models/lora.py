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

  def __init__(self, n: int, m: int, axes: LogicalAxes, config: LoRAConfig, *, rngs: nnx.Rngs, int8: bool = False,
               to_heads: int | None = None, from_heads: int | None = None):
    super().__init__(n, m, axes, bias=False, rngs=rngs, int8=int8, to_heads=to_heads, from_heads=from_heads)
    self.lora_a = parameter(rngs, _init_a, (n, config.rank), (axes[0], None))
    self.lora_b = parameter(rngs, jax.nn.initializers.zeros, (config.rank, m), (None, axes[1]))
    self.scale, self.rate = config.alpha / config.rank, config.dropout

  def __call__(self, x: Array, key: Array | None = None) -> Array:
    a, b = (factor[...].astype(x.dtype) for factor in (self.lora_a, self.lora_b))
    dropped = dropout(x, self.rate, key)
    low = dropped @ a if self.from_heads is None else product_from_heads(dropped, a)
    adapted = low @ b if self.to_heads is None else product_to_heads(low, b.T, self.to_heads)
    return checkpoint_name(super().__call__(x) + self.scale * adapted, LINEAR)
