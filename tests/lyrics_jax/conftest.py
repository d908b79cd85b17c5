"""Made-up records, and two small tokenizers trained on their texts."""

import io

import numpy as np
import pytest
from PIL import Image

from lyrics_jax.config import (Config, DataConfig, LLMConfig, MQFormerConfig, ModelConfig, RefinerConfig, VisionConfig)
from lyrics_jax.data.train_tokenizers import record_texts, write_tokenizers
from refiner_export.records.record import ASSISTANT, USER, Conversation, Record, Turn

TAGS = ("cat", "red ball", "fire hydrant", "dog", "café table")
DIALOGUES = (
    ("vqa", ("How many cats are there?", "two")),
    ("rec", ("the red ball", "<box 0>")),
    ("region", ("<box 0>", "a red ball on the floor")),
    ("caption", ("", "A cat plays with a ball.")),
    ("text_vqa", ("What does the sign say?", "STOP 25")),
    ("grounded_caption", ("", "A cat <box 1> plays with a ball <box 0>.")),
    ("multiple_choice", ("What plays? (a) cat (b) ball", "(a)")),
    ("dialogue", ("Who sits on the left?", "A dog.", "Is it large?", "Yes, very.", "Where?", "At <box 1>.")),
)


class Memory(list):
  """Records in memory, read like an exported directory."""

  def read_conversation_counts(self):
    return np.array([len(record.conversations) for record in self], np.int64)


def make_record(index: int, objects: int = 4, rows: int = 6, conversations=DIALOGUES, captions=None) -> Record:
  rng = np.random.default_rng(index)
  corners = np.sort(rng.uniform(0, 1, (objects + 2, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
  data = io.BytesIO()
  Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(data, "JPEG")
  turns = lambda texts: tuple(Turn((USER, ASSISTANT)[k % 2], text) for k, text in enumerate(texts))
  return Record(
      id=f"picture-{index}", source="made-up", image=data.getvalue(), height=48, width=64,
      captions=captions or (f"A cat and {index} balls.", "A dog left of a fire hydrant.", "Something red lies there."),
      conversations=tuple(Conversation(task, turns(texts)) for task, texts in conversations),
      text_boxes=corners[objects:], tags=tuple(TAGS[k % len(TAGS)] for k in range(objects)),
      boxes=corners[:objects], scores=np.linspace(0.9, 0.3, objects, dtype=np.float32),
      detection_features=rng.standard_normal((rows, 256)).astype(np.float32),
      detection_boxes=rng.uniform(0.2, 0.6, (rows, 4)).astype(np.float32),
      mask_features=rng.standard_normal((objects, 256)).astype(np.float32))


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


@pytest.fixture(scope="session")
def make_config(tokenizer_directory):
  """A small configuration; keyword arguments replace fields of `Config`, or, given as a dictionary, of a part of it."""

  def make(**changes) -> Config:
    config = Config(
        stage="align", output="unused", batch_size=4, steps=10, seed=3,
        model=ModelConfig(vision=VisionConfig(image_size=28, width=16, heads=2, layers=1, mlp_dim=32),
                          refiner=RefinerConfig(detection_rows=8, mask_rows=5),
                          mq_former=MQFormerConfig(width=16, heads=2, layers=2, visual_queries=2, grounding_queries=2,
                                                   vocab_size=1024),
                          llm=LLMConfig(vocab_size=1024, width=16, heads=2, kv_heads=2, layers=1, mlp_dim=32)),
        data=DataConfig(records="memory", mq_former_tokenizer=f"{tokenizer_directory}/mq_former",
                        llm_tokenizer=f"{tokenizer_directory}/llm",
                        spatial_length=192, caption_length=24, llm_length=320, buckets=(1.0,)))
    for name, value in changes.items():
      if isinstance(value, dict):
        for part, setting in value.items():
          setattr(getattr(config, name), part, setting)
      else:
        setattr(config, name, value)
    config.finalize()
    return config

  return make
