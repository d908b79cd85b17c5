"""What models take: pictures with what a refiner found in them, their features, and text of the MQ-Former."""

import dataclasses

import jax
import jax.numpy as jnp

from lyrics_jax.models.layers.parameter import Array
from lyrics_jax.models.visibility import C, S

TokenIds = tuple[Array, Array]  # int32[B, T] token ids, and bool[B, T], False on padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pictures:
  """P pictures, and the refiner's rows where the model reads them.

  `image`: uint8[P, S, S, 3]. `detection`: float32[P, N, W + 4] and `masks`: float32[P, M, W + 4], a feature and a box
  (cxcywh in [0, 1]) per row. `detection_mask`, `masks_mask`: bool, False on padding. Without a refiner the four are
  None.
  """
  image: Array
  detection: Array | None = None
  detection_mask: Array | None = None
  masks: Array | None = None
  masks_mask: Array | None = None

  @classmethod
  def of(cls, batch: dict[str, Array]) -> "Pictures":
    """The B * I pictures of a batch whose fields are [B, I, ...]."""
    found = {}
    for field in dataclasses.fields(cls):
      if field.name in batch:
        found[field.name] = merge_pictures(batch[field.name])
    return cls(**found)


def merge_pictures(x: Array) -> Array:
  """[B, I, ...] -> [B * I, ...]: the pictures of a row follow each other."""
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # -1 is undetermined without mask rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Features:
  """What the frozen parts make of P pictures.

  `image`: [P, T, D] tokens of the image encoder. `detection` [P, N, W + 4] and `masks` [P, M, W + 4] are the refiner's,
  in the dtype of the computation; `valid`: bool[P, N + M], False on padding. Without a refiner the three are None.
  """
  image: Array
  detection: Array | None = None
  masks: Array | None = None
  valid: Array | None = None

  @classmethod
  def of(cls, pictures: Pictures, tokens: Array) -> "Features":
    """From the image encoder's tokens, [P, T, D]."""
    if pictures.detection is None:
      return cls(tokens)
    valid = jnp.concatenate([pictures.detection_mask, pictures.masks_mask], axis=1)
    return cls(tokens, pictures.detection.astype(tokens.dtype), pictures.masks.astype(tokens.dtype), valid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Text:
  """Tokens of the MQ-Former's text side.

  `ids`: int32[B, T]; `valid`: bool[B, T], False on padding; `positions`: int32[B, T]; `segments`: int[T], for each
  place S (spatial representation) or C (caption or instruction).
  """
  ids: Array
  valid: Array
  positions: Array
  segments: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def spatial_and_caption(spatial: TokenIds | None, caption: TokenIds | None, restart: bool) -> Text:
  """Joins the spatial representation and the caption or instruction; either may be absent.

  With `restart` the caption's positions begin at 0 again, else after the last token of the spatial representation.
  """
  ids, valid, positions, segments = [], [], [], ()
  start = 0
  for segment, part in ((S, spatial), (C, caption)):
    if part is None:
      continue
    part_ids, part_valid = part
    places = jnp.arange(part_ids.shape[1], dtype=jnp.int32)
    positions.append(jnp.broadcast_to(start + places, part_ids.shape))
    ids.append(part_ids)
    valid.append(part_valid)
    segments += (segment,) * part_ids.shape[1]
    if not restart:
      start = part_valid.sum(1, keepdims=True, dtype=jnp.int32)
  return Text(jnp.concatenate(ids, 1), jnp.concatenate(valid, 1), jnp.concatenate(positions, 1), segments)
