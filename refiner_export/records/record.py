"""The record: one picture with its texts, objects and refiner features, as one serialised `tf.train.Example`.

This file is the only place that knows the field names. It is TFDS' `FeaturesDict` underneath (no TensorFlow is needed),
so the exported directory is described by TFDS metadata; the trainer imports this file and nothing else of the exporter's
inner parts.

Boxes of objects are `xyxy` corners in [0, 1] of the stored picture. Boxes of detector rows are `cxcywh` in [0, 1], as
Grounding-DINO gives them, and are stored as 16-bit fractions (error below 8e-6), whatever the features are stored as.
Texts refer to boxes by the placeholder `<box K>`, K an index into `text_boxes`, so that augmentation can move them.
"""

import dataclasses
import hashlib
import json
import re

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from refiner_export.records.features import FEATURE_DTYPES, FEATURE_WIDTH, FeatureSums, restore, store, stored_dtype
from refiner_export.common.settings import UserError, require

SCHEMA_VERSION = 1
OPTIONAL_FIELDS = ("mask_ious", "mask_areas", "mask_rles")  # those that a directory's records have, its manifest names
BOX_PLACEHOLDER = re.compile(r"<box (\d+)>")
USER, ASSISTANT = "user", "assistant"

_BOX_STEPS = 65535
_VERSION_ALONE = tfds.features.FeaturesDict({"schema_version": tfds.features.Scalar(np.int32)})


class RecordError(UserError):
  """A record that cannot be read; the message says where it lies and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Turn:
  """One utterance: `role` is `user` or `assistant`; `text` may hold `<box K>` placeholders."""
  role: str
  text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Alternating turns about one picture, user first; `task` names the instruction family, e.g. `vqa` or `rec`."""
  task: str
  turns: tuple[Turn, ...]


def _nothing() -> np.ndarray:
  return np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True)
class Record:
  """One example. K objects, N detector rows, M boxes in texts; all arrays float32."""
  id: str
  source: str
  image: bytes                       # JPEG, EXIF orientation already applied
  height: int                        # pixels of the stored picture
  width: int
  captions: tuple[str, ...]
  conversations: tuple[Conversation, ...]
  text_boxes: np.ndarray             # (M, 4) xyxy
  tags: tuple[str, ...]              # K, lower case
  boxes: np.ndarray                  # (K, 4) xyxy, in descending score
  scores: np.ndarray                 # (K,)
  detection_features: np.ndarray     # (N, 256), in descending score
  detection_boxes: np.ndarray        # (N, 4) cxcywh
  mask_features: np.ndarray          # (K, 256), one per object
  # Of K objects each, or of none where they were not kept:
  mask_ious: np.ndarray = dataclasses.field(default_factory=_nothing)   # how well the segmenter believes a mask to fit
  mask_areas: np.ndarray = dataclasses.field(default_factory=_nothing)  # share of the picture that a mask covers
  mask_rles: tuple[bytes, ...] = ()  # COCO's compressed run-length codes; the `size` of each is (height, width)


class Schema:
  """Encodes and decodes the records of one directory.

  Args:
    feature_dtype: one of `FEATURE_DTYPES`, see `features.store`.
    fingerprint: the refiner's fingerprint, written into every record and compared on reading.
    optional_fields: those of `OPTIONAL_FIELDS` that records have.
    top_k: how many detector rows are kept, those with the highest scores; None keeps all.
  """

  def __init__(self, feature_dtype: str, fingerprint: str, optional_fields: tuple[str, ...] = (),
               top_k: int | None = None):
    require(feature_dtype in FEATURE_DTYPES, f"features.dtype: expected one of {FEATURE_DTYPES}, got {feature_dtype!r}")
    unknown = set(optional_fields) - set(OPTIONAL_FIELDS)
    require(not unknown, f"records have a field {min(unknown, default='')}, unknown to this program: update it")
    self.feature_dtype, self.fingerprint = feature_dtype, fingerprint
    self.optional_fields, self.top_k = optional_fields, top_k
    tensor = lambda shape, dtype: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
    stored, text, number = stored_dtype(feature_dtype), tfds.features.Text, tfds.features.Scalar
    optional = {"mask_ious": tensor((None,), np.float32), "mask_areas": tensor((None,), np.float32),
                "mask_rles": tfds.features.Sequence(text())}
    self.features = tfds.features.FeaturesDict({
        "schema_version": number(np.int32),
        "fingerprint": text(),
        "id": text(),
        "source": text(),
        "image": tfds.features.Tensor(shape=(), dtype=np.object_),
        "height": number(np.int32),
        "width": number(np.int32),
        "captions": tfds.features.Sequence(text()),
        "turns": tfds.features.Sequence({"conversation": number(np.int32), "task": text(), "role": text(), "text": text()}),
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

  def encode(self, record: Record) -> bytes:
    """Serialises a record. Raises `RecordError` when its arrays do not fit together or cannot be stored."""
    check(record)
    optional = {name: getattr(record, name) for name in self.optional_fields}
    for name, values in optional.items():
      if len(values) != len(record.tags):
        raise RecordError(f"record {record.id}: {len(record.tags)} objects, but {len(values)} {name}: have the "
                          "segmenter give them, or do not ask for them in config.features")
    turns = [(k, c.task, t.role, t.text) for k, c in enumerate(record.conversations) for t in c.turns]
    conversation, task, role, text = zip(*turns) if turns else ((), (), (), ())
    (detection, detection_scales), (mask, mask_scales) = self._store(record)
    example = self.features.encode_example({
        "schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint,
        "id": record.id, "source": record.source,
        "image": record.image, "height": record.height, "width": record.width,
        "captions": list(record.captions),
        "turns": {"conversation": list(conversation), "task": list(task), "role": list(role), "text": list(text)},
        "text_boxes": record.text_boxes.astype(np.float32),
        "tags": list(record.tags), "boxes": record.boxes.astype(np.float32), "scores": record.scores.astype(np.float32),
        "detection_features": detection, "detection_scales": detection_scales,
        "detection_boxes": np.rint(np.clip(record.detection_boxes[:self.top_k], 0, 1) * _BOX_STEPS).astype(np.uint16),
        "mask_features": mask, "mask_scales": mask_scales,
        **{name: list(values) if name == "mask_rles" else values.astype(np.float32)
           for name, values in optional.items()},
    })
    # `features.serialize_example` leaves the order of the fields to chance; equal records shall be equal bytes.
    return self._serializer.get_tf_example(example).SerializeToString(deterministic=True)

  def decode(self, serialized: bytes) -> Record:
    """Reads a record back. Raises `RecordError` for bytes of another schema or fingerprint, or no record at all."""
    try:
      fields = self.features.deserialize_example_np(serialized)
    except Exception as error:  # protobuf, TFDS and NumPy each raise their own kind
      _check_version(serialized)
      raise RecordError(f"not a record of schema {SCHEMA_VERSION}: {' '.join(str(error).split())[:200]}") from error
    _check_version_number(int(fields["schema_version"]))
    fingerprint = fields["fingerprint"].decode()
    if fingerprint != self.fingerprint:
      raise RecordError(f"record was made by refiner {fingerprint}, its manifest says {self.fingerprint}: export again")
    decode = lambda texts: tuple(t.decode() for t in texts)
    return Record(
        id=fields["id"].decode(), source=fields["source"].decode(), image=fields["image"],
        height=int(fields["height"]), width=int(fields["width"]),
        captions=decode(fields["captions"]), conversations=_conversations(fields["turns"]),
        text_boxes=fields["text_boxes"], tags=decode(fields["tags"]), boxes=fields["boxes"], scores=fields["scores"],
        detection_features=restore(fields["detection_features"], fields["detection_scales"], self.feature_dtype),
        detection_boxes=fields["detection_boxes"].astype(np.float32) / _BOX_STEPS,
        mask_features=restore(fields["mask_features"], fields["mask_scales"], self.feature_dtype),
        **{name: tuple(fields[name]) if name == "mask_rles" else fields[name] for name in self.optional_fields})

  def measure(self, record: Record) -> FeatureSums:
    """What the features that are kept of a record cost, and what of them a reader does not get back."""
    stored = self._store(record)
    given = np.concatenate([record.detection_features[:self.top_k], record.mask_features])
    read = np.concatenate([restore(*rows, self.feature_dtype) for rows in stored])
    boxes = record.detection_boxes[:self.top_k].size * np.dtype(np.uint16).itemsize
    return FeatureSums.of(given, read, boxes + sum(array.nbytes for rows in stored for array in rows))

  def _store(self, record: Record) -> list[tuple[np.ndarray, np.ndarray]]:
    """The detector's rows that are kept, and the objects' rows."""
    try:
      return [store(rows, self.feature_dtype)
              for rows in (record.detection_features[:self.top_k], record.mask_features)]
    except ValueError as error:
      raise RecordError(f"record {record.id}: {error}") from None


def fingerprint(settings: dict) -> str:
  """Twelve hex digits that name a refiner: the hash of everything that decides its features."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _conversations(turns: dict) -> tuple[Conversation, ...]:
  grouped: dict[int, tuple[str, list[Turn]]] = {}
  for index, task, role, text in zip(turns["conversation"], turns["task"], turns["role"], turns["text"]):
    grouped.setdefault(int(index), (task.decode(), []))[1].append(Turn(role.decode(), text.decode()))
  return tuple(Conversation(task, tuple(spoken)) for task, spoken in grouped.values())


def _check_version(serialized: bytes) -> None:
  """Other versions may have other fields, but this one all have had."""
  try:
    version = int(_VERSION_ALONE.deserialize_example_np(serialized)["schema_version"])
  except Exception:  # not even that
    return
  _check_version_number(version)


def _check_version_number(version: int) -> None:
  if version != SCHEMA_VERSION:
    raise RecordError(f"record has schema version {version}, this program reads {SCHEMA_VERSION}: export again")


def check(record: Record) -> None:
  """Raises `RecordError` when the parts of a record do not fit together."""
  objects, rows = len(record.tags), len(record.detection_features)
  shapes = {"boxes": (objects, 4), "scores": (objects,), "mask_features": (objects, FEATURE_WIDTH),
            "detection_features": (rows, FEATURE_WIDTH), "detection_boxes": (rows, 4),
            "text_boxes": (len(record.text_boxes), 4),
            "mask_ious": (len(record.mask_ious),), "mask_areas": (len(record.mask_areas),)}
  for name, shape in shapes.items():
    value = getattr(record, name)
    if value.shape != shape:
      raise RecordError(f"record {record.id}: {name} has shape {value.shape}, expected {shape}")
    if not np.isfinite(value).all():
      raise RecordError(f"record {record.id}: {name} holds a value that is not finite")
  for conversation in record.conversations:
    roles = [turn.role for turn in conversation.turns]
    if roles != [USER, ASSISTANT] * (len(roles) // 2) or not roles:
      raise RecordError(f"record {record.id}: turns must alternate user, assistant; got {roles}")
    for turn in conversation.turns:
      for index in BOX_PLACEHOLDER.findall(turn.text):
        if int(index) >= len(record.text_boxes):
          raise RecordError(f"record {record.id}: <box {index}> but only {len(record.text_boxes)} text boxes")
