"""How a record is serialised: one `tf.train.Example`, described by a TFDS `FeaturesDict`. TensorFlow is not needed.

This file is the only place that knows the field names of schema 2; `schema_1.py` knows the names of schema 1.
Objects, detector rows and boxes of all pictures of a record lie one after the other in flat arrays, picture
by picture, and `pictures` says how many belong to which picture. Boxes of detector rows are stored as 16-bit
fractions (error below 8e-6), whatever type the features are stored as.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from refiner_export.common.settings import require
from refiner_export.records.decoding import decoding
from refiner_export.records.features import FEATURE_DTYPES, FEATURE_WIDTH, FeatureSums, restore, store, stored_dtype
from refiner_export.records.record import (
    OPTIONAL_FIELDS, Conversation, Picture, Record, RecordError, Turn, check, conversation_items)
from refiner_export.records.shard_files import ShardItem

SCHEMA_VERSION = 2

_BOX_STEPS = 65535
_VERSION_ALONE = tfds.features.FeaturesDict({"schema_version": tfds.features.Scalar(np.int32)})


class Schema:
  """Encodes and decodes the records of one directory of schema 2.

  Args:
    feature_dtype: one of `FEATURE_DTYPES`, see `features.store`.
    fingerprint: the refiner's fingerprint. It is written into every record and compared on reading.
    optional_fields: the fields of `OPTIONAL_FIELDS` that records have.
    top_k: how many detector rows are kept of a picture, those with the highest scores; None keeps all.

  Raises:
    UserError: an unknown type or optional field.
  """

  def __init__(self, feature_dtype: str, fingerprint: str, optional_fields: tuple[str, ...] = (),
               top_k: int | None = None):
    check_fields(feature_dtype, optional_fields)
    self.feature_dtype, self.fingerprint = feature_dtype, fingerprint
    self.optional_fields, self.top_k = optional_fields, top_k
    text, number, stored = tfds.features.Text, tfds.features.Scalar, stored_dtype(feature_dtype)
    optional = optional_features()
    self.features = tfds.features.FeaturesDict({
        "schema_version": number(np.int32),
        "fingerprint": text(),
        "id": text(),
        "source": text(),
        "pictures": tfds.features.Sequence({
            "image": tfds.features.Tensor(shape=(), dtype=np.object_), "credit": text(),
            "height": number(np.int32), "width": number(np.int32),
            # How many rows of the flat arrays below belong to the picture.
            "objects": number(np.int32), "detection_rows": number(np.int32), "text_boxes": number(np.int32)}),
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
    self._serializer = example_serializer.ExampleSerializer(self.features.get_serialized_info())

  def counts(self, record: Record) -> tuple[int, int]:
    """What a shard's index says of a record: the number of its conversation items, and of its pictures."""
    return len(conversation_items(record)), len(record.pictures)

  def item(self, record: Record) -> ShardItem:
    """What a shard stores of a record. Raises `RecordError` as `encode` does."""
    return ShardItem(self.encode(record), *self.counts(record), self.measure(record))

  def encode(self, record: Record) -> bytes:
    """Serialises a record. Raises `RecordError` when its arrays do not fit together or cannot be stored."""
    check(record)
    detection, detection_scales = self._store(record, self._detection_rows(record))
    mask, mask_scales = self._store(record, _joined(record, "mask_features", (FEATURE_WIDTH,)))
    example = self.features.encode_example({
        "schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint,
        "id": record.id, "source": record.source,
        "pictures": self._describe_pictures(record.pictures),
        "captions": list(record.captions),
        "turns": encode_turns(record.conversations),
        "text_boxes": _joined(record, "text_boxes", (4,)),
        "tags": _joined_tuples(record, "tags"),
        "boxes": _joined(record, "boxes", (4,)), "scores": _joined(record, "scores", ()),
        "detection_features": detection, "detection_scales": detection_scales,
        "detection_boxes": encode_boxes(self._first_rows(record, "detection_boxes", 4)),
        "mask_features": mask, "mask_scales": mask_scales,
        **self._optional(record),
    })
    # `features.serialize_example` leaves the order of the fields to chance, but equal records must be equal bytes.
    return self._serializer.get_tf_example(example).SerializeToString(deterministic=True)

  def decode(self, serialized: bytes) -> Record:
    """Reads a record back. Raises `RecordError` for bytes of another schema or fingerprint, or no record at all."""
    with decoding(SCHEMA_VERSION):
      fields = read_fields(self.features, serialized, SCHEMA_VERSION, self.fingerprint)
      return Record(
          id=fields["id"].decode(), source=fields["source"].decode(), pictures=self._pictures(fields),
          captions=decode_texts(fields["captions"]), conversations=decode_turns(fields["turns"]))

  def measure(self, record: Record) -> FeatureSums:
    """What the kept features of a record cost in bytes, and how far a reader's features are from the given ones."""
    rows = [self._detection_rows(record), _joined(record, "mask_features", (FEATURE_WIDTH,))]
    size = self._first_rows(record, "detection_boxes", 4).size * np.dtype(np.uint16).itemsize
    read = []
    for given in rows:
      stored, scales = self._store(record, given)
      size += stored.nbytes + scales.nbytes
      read.append(restore(stored, scales, self.feature_dtype))
    return FeatureSums.of(np.concatenate(rows), np.concatenate(read), size)

  def _describe_pictures(self, pictures: Sequence[Picture]) -> dict[str, list]:
    names = ("image", "credit", "height", "width", "objects", "detection_rows", "text_boxes")
    described = {name: [] for name in names}
    for picture in pictures:
      rows = len(picture.detection_features[:self.top_k])
      counts = (len(picture.tags), rows, len(picture.text_boxes))
      values = (picture.image, picture.credit, picture.height, picture.width, *counts)
      for name, value in zip(names, values, strict=True):
        described[name].append(value)
    return described

  def _optional(self, record: Record) -> dict[str, np.ndarray | list[bytes]]:
    for number, picture in enumerate(record.pictures):
      for name in self.optional_fields:
        objects, values = len(picture.tags), len(getattr(picture, name))
        if values != objects:
          raise RecordError(f"record {record.id}: picture {number}: {objects} objects, but {values} {name}: have the "
                            "segmenter give them, or do not ask for them in config.features")
    optional = {}
    for name in self.optional_fields:
      optional[name] = _joined_tuples(record, name) if name == "mask_rles" else _joined(record, name, ())
    return optional

  def _detection_rows(self, record: Record) -> np.ndarray:
    return self._first_rows(record, "detection_features", FEATURE_WIDTH)

  def _first_rows(self, record: Record, name: str, width: int) -> np.ndarray:
    """float32 (rows, width): the detector rows that are kept, of all pictures."""
    kept = [np.zeros((0, width), np.float32)]
    for picture in record.pictures:
      kept.append(getattr(picture, name)[:self.top_k])
    return np.concatenate(kept).astype(np.float32)

  def _store(self, record: Record, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
      return store(rows, self.feature_dtype)
    except ValueError as error:
      raise RecordError(f"record {record.id}: {error}") from None

  def _pictures(self, fields: dict) -> tuple[Picture, ...]:
    described = fields["pictures"]
    tags = decode_texts(fields["tags"])
    detection_features = restore(fields["detection_features"], fields["detection_scales"], self.feature_dtype)
    detection_boxes = decode_boxes(fields["detection_boxes"])
    mask_features = restore(fields["mask_features"], fields["mask_scales"], self.feature_dtype)
    objects = _slices(described["objects"], len(tags), "objects")
    rows = _slices(described["detection_rows"], len(detection_features), "detection rows")
    boxes = _slices(described["text_boxes"], len(fields["text_boxes"]), "text boxes")
    pictures = []
    for k, image in enumerate(described["image"]):
      optional = {name: fields[name][objects[k]] for name in self.optional_fields}
      if "mask_rles" in optional:
        optional["mask_rles"] = tuple(optional["mask_rles"])
      pictures.append(Picture(
          image=image, height=int(described["height"][k]), width=int(described["width"][k]),
          tags=tags[objects[k]], boxes=fields["boxes"][objects[k]], scores=fields["scores"][objects[k]],
          detection_features=detection_features[rows[k]], detection_boxes=detection_boxes[rows[k]],
          mask_features=mask_features[objects[k]], text_boxes=fields["text_boxes"][boxes[k]],
          credit=described["credit"][k].decode(), **optional))
    return tuple(pictures)


def fingerprint(settings: dict) -> str:
  """Twelve hex digits that name a refiner: the hash of everything that decides its features."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


# --- what both schemas share ---


def check_fields(feature_dtype: str, optional_fields: Sequence[str]) -> None:
  """Raises `UserError` for a type of features or an optional field that this program does not know."""
  require(feature_dtype in FEATURE_DTYPES, f"features.dtype: expected one of {FEATURE_DTYPES}, got {feature_dtype!r}")
  unknown = set(optional_fields) - set(OPTIONAL_FIELDS)
  require(not unknown, f"records have a field {min(unknown, default='')}, unknown to this program: update it")


def tensor(shape: tuple[int | None, ...], dtype: type) -> tfds.features.Tensor:
  """An array that is stored as its bytes."""
  return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


def optional_features() -> dict[str, tfds.features.FeatureConnector]:
  """The TFDS type of each of `OPTIONAL_FIELDS`."""
  return {"mask_ious": tensor((None,), np.float32), "mask_areas": tensor((None,), np.float32),
          "mask_rles": tfds.features.Sequence(tfds.features.Text())}


def turn_features() -> tfds.features.Sequence:
  """The TFDS type of all turns of a record; `conversation` numbers the conversation that a turn belongs to."""
  text = tfds.features.Text
  return tfds.features.Sequence(
      {"conversation": tfds.features.Scalar(np.int32), "task": text(), "role": text(), "text": text()})


def read_fields(features: tfds.features.FeaturesDict, serialized: bytes, version: int, fingerprint: str) -> dict:
  """Parses a record into its fields.

  Raises:
    RecordError: the bytes are no record, or a record of another schema version or refiner.
  """
  try:
    fields = features.deserialize_example_np(serialized)
  except Exception as error:  # protobuf, TFDS and NumPy raise different classes
    _check_version(serialized, version)
    raise RecordError(f"not a record of schema {version}: {' '.join(str(error).split())[:200]}") from error
  _check_version_number(int(fields["schema_version"]), version)
  written = fields["fingerprint"].decode()
  if written != fingerprint:
    raise RecordError(f"record was made by refiner {written}, its manifest says {fingerprint}: export again")
  return fields


def encode_boxes(boxes: np.ndarray) -> np.ndarray:
  """float32 (N, 4) in [0, 1] -> uint16 (N, 4)."""
  return np.rint(np.clip(boxes, 0, 1) * _BOX_STEPS).astype(np.uint16)


def decode_boxes(stored: np.ndarray) -> np.ndarray:
  """uint16 (N, 4) -> float32 (N, 4) in [0, 1]."""
  return stored.astype(np.float32) / _BOX_STEPS


def decode_texts(texts: Sequence[bytes]) -> tuple[str, ...]:
  return tuple([text.decode() for text in texts])


def encode_turns(conversations: Sequence[Conversation]) -> dict[str, list]:
  encoded = {"conversation": [], "task": [], "role": [], "text": []}
  for number, conversation in enumerate(conversations):
    for turn in conversation.turns:
      encoded["conversation"].append(number)
      encoded["task"].append(conversation.task)
      encoded["role"].append(turn.role)
      encoded["text"].append(turn.text)
  return encoded


def decode_turns(turns: dict) -> tuple[Conversation, ...]:
  tasks: dict[int, str] = {}
  spoken: dict[int, list[Turn]] = {}
  for number, task, role, text in zip(turns["conversation"], turns["task"], turns["role"], turns["text"]):
    tasks.setdefault(int(number), task.decode())
    spoken.setdefault(int(number), []).append(Turn(role.decode(), text.decode()))
  return tuple([Conversation(tasks[number], tuple(spoken[number])) for number in tasks])


def _check_version(serialized: bytes, expected: int) -> None:
  """Reads the version alone: another version may have other fields, but every version has this one."""
  try:
    version = int(_VERSION_ALONE.deserialize_example_np(serialized)["schema_version"])
  except Exception:  # the bytes are no record of any version
    return
  _check_version_number(version, expected)


def _check_version_number(version: int, expected: int) -> None:
  if version != expected:
    raise RecordError(f"record has schema version {version}, its manifest says {expected}: export again")


def _joined(record: Record, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """float32 (n, *shape): an array field of all pictures, one after the other."""
  parts = [np.zeros((0, *shape), np.float32)]
  for picture in record.pictures:
    parts.append(getattr(picture, name))
  return np.concatenate(parts).astype(np.float32)


def _joined_tuples(record: Record, name: str) -> list:
  """The entries of a tuple field of all pictures, one after the other."""
  joined = []
  for picture in record.pictures:
    joined += getattr(picture, name)
  return joined


def _slices(counts: Sequence[int], total: int, name: str) -> list[slice]:
  """The part of a flat array that belongs to each picture."""
  ends = np.cumsum(counts, dtype=np.int64).tolist()
  if (ends[-1] if ends else 0) != total:
    raise RecordError(f"not a record of schema {SCHEMA_VERSION}: {total} {name} do not fit the counts of its pictures")
  return [slice(end - int(count), end) for end, count in zip(ends, counts)]
