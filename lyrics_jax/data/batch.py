"""THE table of a batch's fields: shape, dtype and padding of every array that a model or an objective reads.

Specs, padding, buckets, made-up batches, token counts and the planner's shapes all come from this table. A model and an
objective name the fields that they read; an objective may add fields of its own (`Objective.adds`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import DTypeLike

from refiner_export.common.settings import require

Batch = dict[str, np.ndarray]
Fields = dict[str, "Field"]


@dataclasses.dataclass(frozen=True)
class Dimensions:
  """The sizes that occur in the shapes of a batch. A size that no field of the run needs is 0.

  `Config.dimensions` computes them from the model and the data settings.
  """
  rows: int = 0  # examples of a global batch
  pictures: int = 1  # most pictures of a row
  image_size: int = 0  # pixels
  detection_rows: int = 0
  mask_rows: int = 0
  local_width: int = 0  # of a local token: its feature (256) and its box (4)
  spatial: int = 0  # tokens of a picture's spatial representation
  caption: int = 0  # tokens of a caption, and of an instruction for the MQ-Former
  conversation: int = 0  # tokens of a row of conversations, the soft tokens of its pictures included
  tokens: int = 0  # soft tokens of a picture
  former_vocabulary: int = 0  # rows of the MQ-Former's word embedding
  llm_vocabulary: int = 0  # rows of the language model's word embedding

  @property
  def soft_tokens(self) -> int:
    """Soft tokens of all pictures of a row."""
    return self.pictures * self.tokens


@dataclasses.dataclass(frozen=True)
class Field:
  """One array of a batch.

  Args:
    dims: names of `Dimensions`, or numbers; the first is always "rows".
    dtype: of the array.
    padding: what stands where there is nothing: behind a text, in place of a picture that a row does not have.
      (Inside a row, a text is padded with the padding id of its tokenizer; masks cover it.)
    below: name of the size of `Dimensions` that bounds the values of an integer field.
    bucket: texts with the same bucket are cut to the same share of their full lengths. The last axis of such a field is
      the axis of tokens. None for a field that is no text.
    mask: name of the field whose non-zero elements mark the valid positions of this one; a mask names itself.
    draw: makes the field of a made-up batch; gets (generator, shape, dimensions, valid), valid being the mask.
  """
  dims: tuple[str | int, ...]
  dtype: DTypeLike
  padding: int | float | bool = 0
  below: str | None = None
  bucket: str | None = None
  mask: str | None = None
  draw: Callable[[np.random.Generator, tuple[int, ...], Dimensions, np.ndarray], np.ndarray] | None = None

  def shape(self, dimensions: Dimensions) -> tuple[int, ...]:
    shape = []
    for name in self.dims:
      shape.append(name if isinstance(name, int) else getattr(dimensions, name))
    return tuple(shape)

  def example_shape(self, dimensions: Dimensions) -> tuple[int, ...]:
    """The shape of the field in one example, which has no rows axis."""
    return self.shape(dimensions)[1:]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
  """Shape and dtype of an array that need not exist."""
  shape: tuple[int, ...]
  dtype: np.dtype


def _draw_slots(rng, shape, dimensions, valid):
  """Soft tokens from the third token on, of as many whole pictures as leave two tokens of text behind them."""
  slot = np.full(shape, -1, np.int32)
  room = max(shape[-1] - 4, 0)
  count = min(dimensions.soft_tokens, room - room % max(dimensions.tokens, 1))
  slot[:, 2:2 + count] = np.arange(count)
  return slot


def _draw_targets(rng, shape, dimensions, valid):
  """Half of the tokens behind the pictures; always the first of them, which is always valid."""
  start = (_draw_slots(rng, shape, dimensions, valid) >= 0).sum(-1, keepdims=True) + 2
  position = np.arange(shape[-1])
  return (position == start) | valid & (position > start) & (rng.random(shape) < 0.5)


def _draw_segments(rng, shape, dimensions, valid):
  """One conversation a row, of random length; at least its pictures and two tokens on either side."""
  shortest = min(dimensions.soft_tokens + 4, shape[-1])
  return (np.arange(shape[-1]) < rng.integers(shortest, shape[-1] + 1, (*shape[:-1], 1))).astype(np.int32)


def _draw_numbers(rng, shape, dimensions, valid):
  """A different number for each picture."""
  return rng.permutation(math.prod(shape)).reshape(shape)


_PICTURE = ("rows", "pictures")
_CONVERSATION = ("rows", "conversation")

FIELDS: Fields = {
    # Pictures; a row that has fewer than `pictures` is padded.
    "image": Field((*_PICTURE, "image_size", "image_size", 3), "uint8"),
    "picture_mask": Field(_PICTURE, "bool", mask="picture_mask"),
    # A hash of the picture's bytes: pictures with the same number are the same picture, in whichever record they stand.
    "picture_id": Field(_PICTURE, "int32", draw=_draw_numbers),
    # The refiner's local tokens: feature, then box (cxcywh in [0, 1] of the view).
    "detection": Field((*_PICTURE, "detection_rows", "local_width"), "float32", mask="detection_mask"),
    "detection_mask": Field((*_PICTURE, "detection_rows"), "bool", mask="detection_mask"),
    "masks": Field((*_PICTURE, "mask_rows", "local_width"), "float32", mask="masks_mask"),
    "masks_mask": Field((*_PICTURE, "mask_rows"), "bool", mask="masks_mask"),
    # What the MQ-Former reads of each picture: `[BOS]` spatial representation; `[CLS]` instruction `[SEP]`.
    "spatial_ids": Field((*_PICTURE, "spatial"), "int32", 0, "former_vocabulary", "text", "spatial_mask"),
    "spatial_mask": Field((*_PICTURE, "spatial"), "bool", False, None, "text", "spatial_mask"),
    "instruction_ids": Field((*_PICTURE, "caption"), "int32", 0, "former_vocabulary", "text", "instruction_mask"),
    "instruction_mask": Field((*_PICTURE, "caption"), "bool", False, None, "text", "instruction_mask"),
    # Pairs: `[CLS]` caption `[SEP]`.
    "caption_ids": Field(("rows", "caption"), "int32", 0, "former_vocabulary", "caption", "caption_mask"),
    "caption_mask": Field(("rows", "caption"), "bool", False, None, "caption", "caption_mask"),
    # Conversations. `segments` counts the conversations of a row from 1 and is 0 at the padding; `targets` marks the
    # tokens whose prediction is trained; `slot` is I * tokens + t at soft token t of the row's picture I, -1 at text.
    "ids": Field(_CONVERSATION, "int32", 0, "llm_vocabulary", "text", "segments"),
    "segments": Field(_CONVERSATION, "int32", 0, None, "text", "segments", _draw_segments),
    "targets": Field(_CONVERSATION, "bool", False, None, "text", "segments", _draw_targets),
    "slot": Field(_CONVERSATION, "int32", -1, "soft_tokens", "text", "segments", _draw_slots),
}


def select(names: Iterable[str], added: Mapping[str, Field] | None = None) -> Fields:
  """The fields with these names, in the order of the table, then those of `added`, which the table does not have.

  A field comes with its mask. An unknown name is a `UserError`.
  """
  known = FIELDS | dict(added or {})
  wanted = set(names) | set(added or {})
  for name in sorted(wanted):
    require(name in known, f"unknown field {name!r} of a batch; known fields: {', '.join(known)}")
    if known[name].mask is not None:
      wanted.add(known[name].mask)
  return {name: field for name, field in known.items() if name in wanted}


def spec(fields: Fields, dimensions: Dimensions) -> dict[str, ArraySpec]:
  """Shape and dtype of each field in one global batch."""
  return {name: ArraySpec(field.shape(dimensions), np.dtype(field.dtype)) for name, field in fields.items()}


def padding(fields: Fields, dimensions: Dimensions) -> Batch:
  """A batch that holds nothing: every field at its padding."""
  arrays = {}
  for name, field in fields.items():
    arrays[name] = np.full(field.shape(dimensions), field.padding, field.dtype)
  return arrays


def uses_vocabulary(fields: Fields, name: str) -> bool:
  """Whether some field holds ids of the vocabulary with this name of `Dimensions`."""
  return any(field.below == name for field in fields.values())


def text_masks(fields: Fields) -> list[str]:
  """The masks of all texts among the fields, in the order of the fields."""
  return [name for name, field in fields.items() if field.bucket is not None and field.mask == name]


def text_tokens(batch: Mapping[str, np.ndarray], fields: Fields) -> int:
  """How many text positions of a batch hold a token; soft tokens of pictures count, padding does not."""
  count = 0
  for name in text_masks(fields):
    count += int(np.count_nonzero(batch[name]))
  return count


def made_up(fields: Fields, dimensions: Dimensions, seed: int = 0) -> Batch:
  """A random batch that keeps the rules of real ones: valid text in front, padding behind, rows of different lengths.

  All pictures are present, three of four local tokens are valid, and every text has at least two tokens. An integer
  field with padding -1 has a value at two of five valid positions.
  """
  rng, arrays = np.random.default_rng(seed), padding(fields, dimensions)
  for name, field in fields.items():
    if field.mask == name:
      arrays[name][...] = _mask(field, rng, dimensions)
  for name, field in fields.items():
    if field.mask != name:
      valid = np.ones(arrays[name].shape, bool)
      if field.mask in arrays:
        mask = arrays[field.mask] != 0
        valid[...] = mask.reshape(mask.shape + (1,) * (valid.ndim - mask.ndim))
      arrays[name][...] = _values(field, rng, dimensions, valid)
  return arrays


def _mask(field: Field, rng: np.random.Generator, dimensions: Dimensions) -> np.ndarray:
  """A mask of the leading tokens of a text, of all pictures, or of most local tokens."""
  shape = field.shape(dimensions)
  if field.draw is not None:
    return field.draw(rng, shape, dimensions, np.ones(shape, bool))
  if field.bucket is not None:
    return np.arange(shape[-1]) < rng.integers(min(2, shape[-1]), shape[-1] + 1, (*shape[:-1], 1))
  return np.ones(shape, bool) if field.dims == _PICTURE else rng.random(shape) < 0.75


def _values(field: Field, rng: np.random.Generator, dimensions: Dimensions, valid: np.ndarray) -> np.ndarray:
  """Random values where `valid`, padding elsewhere."""
  shape = valid.shape
  if field.draw is not None:
    return field.draw(rng, shape, dimensions, valid)
  if np.dtype(field.dtype) == np.uint8:
    values = rng.integers(0, 256, shape)
  elif field.below is not None:
    values = rng.integers(0, getattr(dimensions, field.below), shape)
    if field.padding == -1:
      valid = valid & (rng.random(shape) < 0.4)
  else:
    values = rng.standard_normal(shape)
  return np.where(valid, values, field.padding)
