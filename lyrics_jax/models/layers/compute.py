"""How a model is computed, apart from what it is: dtypes, kernels and what the backward pass recomputes."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from refiner_export.common.settings import Settings

Dtype = Literal["float32", "bfloat16"]
FrozenDtype = Literal["float32", "bfloat16", "int8"]
Remat = Literal["none", "dots", "attention", "full"]  # from most memory to most work, see `stack.py`
Kernel = Literal["auto", "xla", "splash", "cudnn"]


@dataclasses.dataclass(unsafe_hash=True)
class Compute(Settings):
  """How a run computes.

  Attributes:
    dtype: of activations and products. Trained parameters, softmax and losses are float32.
    frozen_dtype: in which frozen parameters are stored. With int8, the matrices of the transformer blocks are stored in
      int8 with a scale per output channel, and all other frozen parameters in bfloat16.
    remat: what the backward pass recomputes.
    attention: the kernel of the language model's self-attention, see `kernels.py`.
  """
  dtype: Dtype = "bfloat16"
  frozen_dtype: FrozenDtype = "bfloat16"
  remat: Remat = "none"
  attention: Kernel = "auto"

  @property
  def activations(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def storage(self) -> jnp.dtype:
    """The dtype of frozen parameters that are not int8 matrices."""
    return jnp.dtype("bfloat16" if self.frozen_dtype == "int8" else self.frozen_dtype)
