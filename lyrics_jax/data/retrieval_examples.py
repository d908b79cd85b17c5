"""What retrieval sees of a record: its picture as a whole, and each of its captions as a text."""

from typing import TYPE_CHECKING

from lyrics_jax.data.batch import Batch, Dimensions, Fields
from lyrics_jax.data.errors import about
from lyrics_jax.data.pairs import PairExamples, only_picture
from lyrics_jax.data.tokenizers import load_tokenizers
from refiner_export.common.settings import require
from refiner_export.records.record import Record

if TYPE_CHECKING:
  from lyrics_jax.data.settings import DataSettings


class RetrievalExamples:
  """Makes pictures and texts of records, as `PairExamples` makes both without augmentation.

  Args:
    fields: those that the stage reads; they include `spatial_ids` and `caption_ids`.
  """

  def __init__(self, data: "DataSettings", fields: Fields, dimensions: Dimensions):
    tokenizer = load_tokenizers(data, fields, dimensions).former
    self._pairs = PairExamples(data, fields, dimensions, (), tokenizer)

  def picture(self, record: Record) -> Batch:
    """The visual fields of the record's only picture, with a pictures axis of 1, see `PictureInputs.arrays`."""
    with about(record):
      picture = only_picture(record)
      arrays = self._pairs.pictures.arrays(picture, self._pairs.pictures.whole(picture))
    return {name: value[None] for name, value in arrays.items()}

  def texts(self, record: Record) -> list[Batch]:
    """One text for each caption; a record without captions is a `RecordError`.

    Returns, with Ls and Lc = spatial and caption length:
      spatial_ids: int32 (1, Ls), spatial_mask: bool (1, Ls), caption_ids: int32 (Lc,), caption_mask: bool (Lc,).
    """
    with about(record):
      picture = only_picture(record)
      require(bool(record.captions), "it has no caption to be found by: export with captions")
    view, texts = self._pairs.pictures.whole(picture), []
    for caption in record.captions:
      pair = self._pairs.encode(picture, view, caption)
      texts.append({"spatial_ids": pair.spatial_ids[None], "spatial_mask": pair.spatial_mask[None],
                    "caption_ids": pair.caption_ids, "caption_mask": pair.caption_mask})
    return texts
