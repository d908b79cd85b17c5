"""What retrieval sees of a record: its picture as a whole, and each of its captions as a text."""

import dataclasses

import numpy as np

from lyrics_jax.config import Config
from lyrics_jax.data.errors import about
from lyrics_jax.data.images import View
from lyrics_jax.data.mq_former_text import encode_objects, encode_sentence
from lyrics_jax.data.padding import pad_ids
from lyrics_jax.data.tokenizers import MQFormerTokenizer
from lyrics_jax.data.visual import objects_in_view, visual_inputs
from refiner_export.records.record import Record
from refiner_export.common.settings import require


@dataclasses.dataclass(frozen=True)
class RetrievalExamples:
  """Makes pictures and texts of records; both as `align_examples` makes them without augmentation."""
  config: Config
  tokenizer: MQFormerTokenizer

  def picture(self, record: Record) -> dict[str, np.ndarray]:
    """image, detection, detection_mask, masks, masks_mask: see `visual.visual_inputs`."""
    with about(record):
      return visual_inputs(record, View(), self.config.model)

  def texts(self, record: Record) -> list[dict[str, np.ndarray]]:
    """One text per caption; a record without captions is a `RecordError`.

    Each has spatial_ids int32 (Ls,), caption_ids int32 (Lc,) and their spatial_mask and caption_mask, bool; Ls, Lc =
    config.data.spatial_length and caption_length.
    """
    data, tokenizer = self.config.data, self.tokenizer
    with about(record):
      require(bool(record.captions), "it has no caption to be found by: export with captions")
    objects, _ = encode_objects(tokenizer, objects_in_view(record, View(), self.config.model), data.coordinates, data.spatial_length)
    spatial_ids, spatial_mask = pad_ids(objects, data.spatial_length, tokenizer.pad)
    captions = [pad_ids(encode_sentence(tokenizer, caption, data.caption_length), data.caption_length, tokenizer.pad)
                for caption in record.captions]
    return [{"spatial_ids": spatial_ids, "spatial_mask": spatial_mask, "caption_ids": ids, "caption_mask": mask}
            for ids, mask in captions]
