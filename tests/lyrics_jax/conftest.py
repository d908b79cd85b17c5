"""Made-up records, and two small tokenizers trained on their texts."""

import io

import numpy as np
import pytest
from PIL import Image

from lyrics_jax.data.train_tokenizers import record_texts, write_tokenizers
from refiner_export.records.record import ASSISTANT, USER, Conversation, Picture, Record, Turn, conversation_items

TAGS = ("cat", "red ball", "fire hydrant", "dog", "café table")
CAPTIONS = ("A dog left of a fire hydrant.", "Something red lies there.")
DIALOGUES = (
    ("vqa", ("How many cats are there?", "two")),
    ("rec", ("the red ball", "<box 0.0>")),
    ("region", ("<box 0.0>", "a red ball on the floor")),
    ("caption", ("", "A cat plays with a ball.")),
    ("text_vqa", ("What does the sign say?", "STOP 25")),
    ("grounded_caption", ("", "A cat <box 0.1> plays with a ball <box 0.0>.")),
    ("multiple_choice", ("What plays? (a) cat (b) ball", "(a)")),
    ("dialogue", ("Who sits on the left?", "A dog.", "Is it large?", "Yes, very.", "Where?", "At <box 0.1>.")),
)


class Memory(list):
  """Records in memory, read like an exported directory."""

  def read_conversation_counts(self):
    return np.array([len(conversation_items(record)) for record in self], np.int64)


def make_picture(index: int, objects: int = 4, rows: int = 6, width: int = 64, height: int = 48) -> Picture:
  """Noise with `objects` objects, `rows` detector rows and two text boxes."""
  rng = np.random.default_rng(index)
  corners = np.sort(rng.uniform(0, 1, (objects + 2, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
  data = io.BytesIO()
  Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(data, "JPEG")
  return Picture(
      image=data.getvalue(), height=height, width=width,
      text_boxes=corners[objects:], tags=tuple(TAGS[k % len(TAGS)] for k in range(objects)),
      boxes=corners[:objects], scores=np.linspace(0.9, 0.3, objects, dtype=np.float32),
      detection_features=rng.standard_normal((rows, 256)).astype(np.float32),
      detection_boxes=rng.uniform(0.2, 0.6, (rows, 4)).astype(np.float32),
      mask_features=rng.standard_normal((objects, 256)).astype(np.float32))


def make_record(index: int, pictures: int = 1, conversations=DIALOGUES, captions=None, **of_picture) -> Record:
  """A record; picture k of it is `make_picture(index + 100 * k, **of_picture)`."""
  if captions is None:
    captions = (f"A cat and {index} balls.", *CAPTIONS)
  made = []
  for task, texts in conversations:
    turns = tuple(Turn((USER, ASSISTANT)[k % 2], text) for k, text in enumerate(texts))
    made.append(Conversation(task, turns))
  return Record(
      id=f"picture-{index}", source="made-up",
      pictures=tuple(make_picture(index + 100 * k, **of_picture) for k in range(pictures)),
      captions=captions, conversations=tuple(made))


@pytest.fixture(scope="session", name="make_record")
def _make_record():
  return make_record


@pytest.fixture(scope="session")
def records() -> Memory:
  return Memory(make_record(index) for index in range(6))


@pytest.fixture(scope="session")
def tokenizer_directory(records, tmp_path_factory) -> str:
  directory = str(tmp_path_factory.mktemp("tokenizers") / "small")
  write_tokenizers(record_texts(records), directory)
  return directory
