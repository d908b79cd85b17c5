"""Rows of stage 1: a picture, its spatial representation, and one of its captions (paper section 3.2)."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lyrics_jax.data.batch import Dimensions, Fields
from lyrics_jax.data.errors import about
from lyrics_jax.data.mq_former_text import OUTSIDE, encode_objects, padded_sentence
from lyrics_jax.data.padding import pad_ids
from lyrics_jax.data.pictures import VISUAL, PictureInputs
from lyrics_jax.data.rows import Example, Objective, Records, Rows
from lyrics_jax.data.tokenizers import MQFormerTokenizer, load_tokenizers
from lyrics_jax.data.views import View
from lyrics_jax.tasks import mentions_side
from refiner_export.common.settings import require
from refiner_export.records.record import Picture, Record

if TYPE_CHECKING:
  from lyrics_jax.data.settings import DataSettings


@dataclasses.dataclass(unsafe_hash=True)
class Pairs(Rows):
  """One record a row: its picture with one of its captions."""
  makes: ClassVar[tuple[str, ...]] = (*VISUAL, "spatial_ids", "spatial_mask", "caption_ids", "caption_mask")
  item: ClassVar[str] = "record"

  def items(self, records: Records) -> Sequence[Record]:
    return records

  def examples(self, data: "DataSettings", fields: Fields, dimensions: Dimensions,
               objectives: Sequence[Objective] = ()) -> "PairExamples":
    self.check_fields(fields, objectives)
    tokenizer = load_tokenizers(data, fields, dimensions).former
    return PairExamples(data, fields, dimensions, tuple(objectives), tokenizer)

  def check_data(self, data: "DataSettings", path: str) -> None:
    require(data.pictures == 1,
            f"{path}.pictures={data.pictures}: a row of {path}.rows=Pairs has one picture: set it to 1")


@dataclasses.dataclass(frozen=True)
class EncodedPair:
  """The texts of a pair, from which objectives make the fields that they add; Ls = spatial, Lc = caption length.

  Attributes:
    spatial_ids: int32 (Ls,), `[BOS]` and the spatial representation; spatial_mask: bool (Ls,).
    owners: int32 (Ls,), the index of the object whose tag or box a token spells; -1 at other tokens and padding.
    caption_ids: int32 (Lc,), `[CLS]` caption `[SEP]`; caption_mask: bool (Lc,).
  """
  spatial_ids: np.ndarray
  spatial_mask: np.ndarray
  owners: np.ndarray
  caption_ids: np.ndarray
  caption_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairExamples:
  """Makes the examples of `Pairs`."""
  data: "DataSettings"
  fields: Fields
  dimensions: Dimensions
  objectives: tuple[Objective, ...]
  tokenizer: MQFormerTokenizer

  @property
  def pictures(self) -> PictureInputs:
    return PictureInputs(self.data, self.fields, self.dimensions)

  def __call__(self, record: Record, rng: np.random.Generator, augment: bool = True) -> Example:
    """One example; I = 1 picture, Ls and Lc = spatial and caption length.

    Args:
      record: has one picture and at least one caption, else `RecordError`.
      rng: draws the caption, the view, and what objectives draw.
      augment: false takes the first caption and the whole picture.

    Returns, of the fields that the stage reads:
      record: the record's id.
      image and the other visual fields: (I, ...), see `PictureInputs.arrays`.
      spatial_ids: int32 (I, Ls), spatial_mask: bool (I, Ls), caption_ids: int32 (Lc,), caption_mask: bool (Lc,): see
        `EncodedPair`.
      The fields that objectives add.
    """
    with about(record):
      picture = only_picture(record)
      require(bool(record.captions), "it has no caption, which a pair needs: export with captions")
      caption = record.captions[rng.integers(len(record.captions)) if augment else 0]
      view = self.pictures.whole(picture)
      if augment:
        view = self.pictures.sample(picture, rng, flip=not mentions_side(caption))
      pair = self.encode(picture, view, caption)
      arrays = self.pictures.arrays(picture, view)
      arrays |= {"spatial_ids": pair.spatial_ids, "spatial_mask": pair.spatial_mask,
                 "caption_ids": pair.caption_ids, "caption_mask": pair.caption_mask}
      for objective in self.objectives:
        arrays |= objective.prepare(pair, self.tokenizer, rng)
    example = {"record": record.id}
    for name, field in self.fields.items():
      example[name] = np.reshape(arrays[name], field.example_shape(self.dimensions))
    return example

  def encode(self, picture: Picture, view: View, caption: str) -> EncodedPair:
    """The texts of a picture, as seen under a view, and of one caption."""
    data, tokenizer = self.data, self.tokenizer
    objects = self.pictures.objects(picture, view)
    ids, owners = encode_objects(tokenizer, objects, data.coordinates, data.spatial_length)
    spatial_ids, spatial_mask = pad_ids(ids, data.spatial_length, tokenizer.pad)
    owners, _ = pad_ids(owners, data.spatial_length, OUTSIDE)
    caption_ids, caption_mask = padded_sentence(tokenizer, caption, data.caption_length)
    return EncodedPair(spatial_ids, spatial_mask, owners, caption_ids, caption_mask)


def only_picture(record: Record) -> Picture:
  """The picture of a record. Raises `UserError` for a record with none or with several."""
  require(len(record.pictures) == 1,
          f"it has {len(record.pictures)} pictures, and a pair has one: train conversations on it "
          "(config.data.rows=Conversations), or leave it out")
  return record.picture
