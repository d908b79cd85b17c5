"""Schema 1, which is only read: a record had exactly one picture, whose bytes were empty for a record of text alone.

A text of schema 1 pointed at a box by `<box K>`; it is read as `<box 0.K>`.
"""

import re

import numpy as np
import tensorflow_datasets as tfds

from refiner_export.records.decoding import decoding
from refiner_export.records.features import FEATURE_WIDTH, restore, stored_dtype
from refiner_export.records.record import Conversation, Picture, Record, Turn, box_placeholder
from refiner_export.records.schema import (
    check_fields, decode_boxes, decode_texts, decode_turns, optional_features, read_fields, tensor, turn_features)

VERSION = 1
_BOX_PLACEHOLDER = re.compile(r"<box (\d+)>")


class Schema1:
  """Decodes the records of one directory of schema 1.

  Args:
    feature_dtype, fingerprint, optional_fields: as of `Schema`.

  Raises:
    UserError: an unknown type or optional field.
  """

  def __init__(self, feature_dtype: str, fingerprint: str, optional_fields: tuple[str, ...] = ()):
    check_fields(feature_dtype, optional_fields)
    self.feature_dtype, self.fingerprint, self.optional_fields = feature_dtype, fingerprint, optional_fields
    text, number, stored = tfds.features.Text, tfds.features.Scalar, stored_dtype(feature_dtype)
    optional = optional_features()
    self.features = tfds.features.FeaturesDict({
        "schema_version": number(np.int32),
        "fingerprint": text(),
        "id": text(),
        "source": text(),
        "image": tfds.features.Tensor(shape=(), dtype=np.object_),
        "height": number(np.int32),
        "width": number(np.int32),
        "captions": tfds.features.Sequence(text()),
        "turns": turn_features(),
        "text_boxes": tensor((None, 4), np.float32),
        "tags": tfds.features.Sequence(text()),
        "boxes": tensor((None, 4), np.float32),
        "scores": tensor((None,), np.float32),
        "detection_features": tensor((None, FEATURE_WIDTH), stored),
        "detection_scales": tensor((None,), np.float16),
        "detection_boxes": tensor((None, 4), np.uint16),
        "mask_features": tensor((None, FEATURE_WIDTH), stored),
        "mask_scales": tensor((None,), np.float16),
        **{name: optional[name] for name in optional_fields},
    })

  def counts(self, record: Record) -> tuple[int, int]:
    """What is read from a shard's index: it counted the stored conversations alone, and a record had one picture."""
    return len(record.conversations), 1

  def decode(self, serialized: bytes) -> Record:
    """Reads a record. Raises `RecordError` for bytes of another schema or fingerprint, or no record at all."""
    with decoding(VERSION):
      fields = read_fields(self.features, serialized, VERSION, self.fingerprint)
      conversations = []
      for conversation in decode_turns(fields["turns"]):
        turns = [Turn(turn.role, _number_picture(turn.text)) for turn in conversation.turns]
        conversations.append(Conversation(conversation.task, tuple(turns)))
      return Record(
          id=fields["id"].decode(), source=fields["source"].decode(),
          pictures=(self._picture(fields),) if fields["image"] else (),
          captions=decode_texts(fields["captions"]), conversations=tuple(conversations))

  def _picture(self, fields: dict) -> Picture:
    optional = {name: fields[name] for name in self.optional_fields}
    if "mask_rles" in optional:
      optional["mask_rles"] = tuple(optional["mask_rles"])
    return Picture(
        image=fields["image"], height=int(fields["height"]), width=int(fields["width"]),
        tags=decode_texts(fields["tags"]), boxes=fields["boxes"], scores=fields["scores"],
        detection_features=restore(fields["detection_features"], fields["detection_scales"], self.feature_dtype),
        detection_boxes=decode_boxes(fields["detection_boxes"]),
        mask_features=restore(fields["mask_features"], fields["mask_scales"], self.feature_dtype),
        text_boxes=fields["text_boxes"], **optional)


def _number_picture(text: str) -> str:
  return _BOX_PLACEHOLDER.sub(lambda match: box_placeholder(0, int(match[1])), text)
