"""What the trainer reads of an exported directory: the same in either format, and padded where rows were left out."""

import dataclasses
import pickle

import numpy as np
import pytest

from lyrics_jax.data.batch import Dimensions, select
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.pictures import PictureInputs
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.data.views import View
from refiner_export.records.formats import FORMATS, write_shard
from refiner_export.records.manifest import Manifest, shard_name
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.schema import SCHEMA_VERSION, Schema


def export(records, folder, format: str, dtype: str = "int8", top_k: int | None = None) -> RecordDirectory:
  """The records in shards of two."""
  schema, shards = Schema(dtype, "made-up", top_k=top_k), []
  cuts = [records[start:start + 2] for start in range(0, len(records), 2)]
  for number, cut in enumerate(cuts):
    shards.append(write_shard(folder / shard_name(number, len(cuts), format), [schema.item(record) for record in cut]))
  totals = {name: sum(getattr(shard, name) for shard in shards) for name in ("records", "conversations", "pictures")}
  Manifest(schema_version=SCHEMA_VERSION, fingerprint="made-up", feature_dtype=dtype, detection_rows=top_k or 6,
           refiner={"name": "made-up"}, source="test", split="train", shards=tuple(shards), skipped=0, format=format,
           **totals).save(folder)
  return RecordDirectory(folder)


def test_conversation_by_conversation_in_either_format(records, tmp_path):
  given = [*records[:3], dataclasses.replace(records[3], pictures=(), conversations=records[3].conversations[:1])]
  sources = []
  for format in FORMATS:
    (tmp_path / format).mkdir()
    directory = pickle.loads(pickle.dumps(export(given, tmp_path / format, format)))
    assert directory.read_picture_counts().tolist() == [1, 1, 1, 0]
    sources.append(Conversations().items(directory))
  one, other = sources
  assert len(one) == len(other) > 3 * 8
  for k in range(len(one)):
    (first, index), (second, same) = one[k], other[k]
    assert (first.id, index, first.conversations) == (second.id, same, second.conversations)


@pytest.mark.parametrize("top_k", [None, 3])
def test_rows_that_were_left_out_are_padding(records, tmp_path, top_k):
  directory = export(records, tmp_path, "tfrecord", top_k=top_k)
  pictures = PictureInputs(DataSettings(), select(("detection", "masks"), {}),
                           Dimensions(rows=1, image_size=32, detection_rows=5, mask_rows=8, local_width=260))
  for k in range(len(directory)):
    picture = directory[k].picture
    found, rows = pictures.arrays(picture, View()), min(top_k or 6, 5)
    assert found["detection"].shape == (5, 260)
    assert found["detection_mask"].tolist() == [True] * rows + [False] * (5 - rows)
    np.testing.assert_array_equal(found["detection"][:rows, :256], picture.detection_features[:rows])
    assert not found["detection"][rows:].any()
