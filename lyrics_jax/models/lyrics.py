"""Lyrics assembled: image encoder, local tokens and MQ-Former in both stages; alignment heads in the first, LLM in the second."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.config import MQFormerConfig, ModelConfig, RefinerConfig
from lyrics_jax.models.clip import CLIPVision
from lyrics_jax.models.layers import Array, LayerNorm, Linear, normal, parameter, xavier_uniform
from lyrics_jax.models.llama import LLaMA
from lyrics_jax.models.mq_former import MQFormer, Sources

DETECTION, MASK = 0, 1


class LocalTokens(nnx.Module):
  """The refiner's detection rows and mask features as one token sequence of common width (paper section 3.1).

  Each kind has its own linear map (Xavier) and source embedding.
  """

  def __init__(self, config: RefinerConfig, width: int, *, rngs: nnx.Rngs):
    self.detection = Linear(config.feature_width + 4, width, (None, "embed"), init=xavier_uniform, rngs=rngs)
    self.mask = Linear(config.feature_width + 4, width, (None, "embed"), init=xavier_uniform, rngs=rngs)
    self.source = parameter(rngs, normal, (2, width), (None, "embed"))

  def __call__(self, detection: Array, masks: Array) -> Array:
    """[B, N, 260] and [B, M, 260] -> [B, N + M, D]; the last four columns are the box, cxcywh in [0, 1]."""
    source = self.source[...].astype(detection.dtype)
    return jnp.concatenate([self.detection(detection) + source[DETECTION], self.mask(masks) + source[MASK]], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Features:
  """What the frozen parts make of B pictures: nothing that is trained in stage 1 has touched them yet.

  `image`: [B, T, D] tokens of the image encoder; `detection` [B, N, 260] and `masks` [B, M, 260] of the refiner; `valid`:
  bool[B, N + M], False on padding.
  """
  image: Array
  detection: Array
  masks: Array
  valid: Array


class Perception(nnx.Module):
  """Everything that turns a picture and its local features into what the queries attend to."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.dtype = jnp.dtype(config.dtype)
    self.vision = CLIPVision(config.vision, int8=config.frozen_dtype == "int8", rngs=rngs)
    self.image_norm = LayerNorm(config.vision.width, config.vision.norm_eps, rngs=rngs)
    self.local_tokens = LocalTokens(config.refiner, config.mq_former.width, rngs=rngs)
    self.mq_former = MQFormer(config.mq_former, config.vision.width, dtype=self.dtype, remat=config.remat, rngs=rngs)

  def see(self, batch: dict[str, Array]) -> Features:
    """batch: image uint8[B, S, S, 3], detection [B, N, 260], masks [B, M, 260] and bool detection_mask, masks_mask."""
    local = {name: batch[name].astype(self.dtype) for name in ("detection", "masks")}
    valid = jnp.concatenate([batch["detection_mask"], batch["masks_mask"]], axis=1)
    return Features(self.vision(batch["image"], self.dtype), **local, valid=valid)

  def look_at(self, features: Features) -> Sources:
    """The cross-attention keys and values of B pictures."""
    local = self.local_tokens(features.detection, features.masks)
    return self.mq_former.look(self.image_norm(features.image), local, features.valid)

  def look(self, batch: dict[str, Array]) -> Sources:
    """`look_at` what `see` makes of a batch."""
    return self.look_at(self.see(batch))


class LMHead(nnx.Module):
  """BERT's prediction head: dense, activation, norm, then the tied word embedding and a bias."""

  def __init__(self, config: MQFormerConfig, *, rngs: nnx.Rngs):
    self.dense = Linear(config.width, config.width, ("embed", None), rngs=rngs)
    self.norm = LayerNorm(config.width, config.norm_eps, rngs=rngs)
    self.bias = parameter(rngs, jax.nn.initializers.zeros, (config.vocab_size,), ("vocab",))

  def __call__(self, hidden: Array, words) -> Array:
    """[..., D] and the MQ-Former's word `Embedding` -> float32[..., vocabulary]."""
    x = self.norm(jax.nn.gelu(self.dense(hidden), approximate=False))
    return words.logits(x) + self.bias[...]


class LyricsForAlignment(nnx.Module):
  """Stage 1: perception with the heads of ITC, ITM, ICG and MSP. The objectives themselves are in `stages/align.py`."""

  def __init__(self, config: ModelConfig, temperature: float, *, rngs: nnx.Rngs):
    width, itc_width = config.mq_former.width, config.mq_former.itc_width
    self.perception = Perception(config, rngs=rngs)
    self.itc_image = Linear(2 * width, itc_width, ("embed", None), rngs=rngs)
    self.itc_text = Linear(2 * width, itc_width, ("embed", None), rngs=rngs)
    self.temperature = parameter(rngs, jax.nn.initializers.constant(temperature), (), ())
    self.itm = Linear(width, 2, ("embed", None), rngs=rngs)
    self.lm_head = LMHead(config.mq_former, rngs=rngs)


class LyricsForInstruction(nnx.Module):
  """Stage 2: perception, the projection of the query outputs to the LLM's width, and the LLM."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.perception = Perception(config, rngs=rngs)
    self.projection = Linear(config.mq_former.width, config.llm.width, (None, "embed"), rngs=rngs)
    self.llm = LLaMA(config.llm, remat=config.remat, attention=config.attention, int8=config.frozen_dtype == "int8",
                     rngs=rngs)
