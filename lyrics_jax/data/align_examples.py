"""Examples of stage 1: one record with one of its captions (paper section 3.3)."""

import dataclasses

import numpy as np

from lyrics_jax.config import Config
from lyrics_jax.data.errors import about
from lyrics_jax.data.images import View, mentions_side, sample_view
from lyrics_jax.data.mq_former_text import encode_objects, encode_sentence, mask_objects
from lyrics_jax.data.padding import pad_ids
from lyrics_jax.data.tokenizers import MQFormerTokenizer
from lyrics_jax.data.visual import objects_in_view, visual_inputs
from refiner_export.records.record import Record
from refiner_export.common.settings import require

IGNORED = -1  # target of a token that MSP does not predict


@dataclasses.dataclass(frozen=True)
class AlignExamples:
  """Makes the examples of stage 1."""
  config: Config
  tokenizer: MQFormerTokenizer

  def __call__(self, record: Record, rng: np.random.Generator, augment: bool = True) -> dict[str, np.ndarray | str]:
    """One example; Ls = config.data.spatial_length, Lc = config.data.caption_length.

    Args:
      record: has at least one caption, else `RecordError`.
      rng: draws the caption, the view and the masked objects.
      augment: false takes the first caption and the whole picture.

    Returns:
      id: the record's.
      image, detection, detection_mask, masks, masks_mask: see `visual.visual_inputs`.
      spatial_ids: int32 (Ls,), `[BOS]` and the spatial representation; spatial_mask: bool (Ls,).
      msp_ids: int32 (Ls,), the same with `[MLM]` for `[BOS]` and `[MASK]` for the tokens to predict;
      msp_targets: int32 (Ls,), the original ids there, -1 elsewhere.
      caption_ids: int32 (Lc,), `[CLS]` caption `[SEP]`; caption_mask: bool (Lc,).
      icg_ids: int32 (Lc,), the same with `[DEC]` for `[CLS]`.
    """
    data, model, tokenizer = self.config.data, self.config.model, self.tokenizer
    with about(record):
      require(bool(record.captions), "it has no caption, which stage 1 needs: export with captions")
      caption = record.captions[rng.integers(len(record.captions)) if augment else 0]
      view = sample_view(rng, data.crop_scale, data.flip and not mentions_side(caption)) if augment else View()
      visual = visual_inputs(record, view, model)

    ids, owners = encode_objects(tokenizer, objects_in_view(record, view, model), data.coordinates, data.spatial_length)
    masked = mask_objects(owners, self.config.align.mask_probability, rng)
    spatial_ids, spatial_mask = pad_ids(ids, data.spatial_length, tokenizer.pad)
    masked, _ = pad_ids(masked, data.spatial_length, False)
    msp_ids = np.where(masked, np.int32(tokenizer.mask), spatial_ids)
    msp_ids[0] = tokenizer.mlm
    caption_ids, caption_mask = pad_ids(
        encode_sentence(tokenizer, caption, data.caption_length), data.caption_length, tokenizer.pad)
    icg_ids = caption_ids.copy()
    icg_ids[0] = tokenizer.dec
    return {"id": record.id, **visual,
            "spatial_ids": spatial_ids, "spatial_mask": spatial_mask,
            "msp_ids": msp_ids, "msp_targets": np.where(masked, spatial_ids, np.int32(IGNORED)),
            "caption_ids": caption_ids, "caption_mask": caption_mask, "icg_ids": icg_ids}
