"""The sizes of the study: a slice for a test, a small form for two CPU cores, and the full form for an accelerator."""

import dataclasses

from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vision.vit import ViTSettings

VOCABULARY = 1024  # rows of both word embeddings; the trained tokenizers have fewer tokens
OBJECT_TOKENS = 36  # of an object in the spatial representation, at most
SENTENCE_TOKENS = 48  # of a caption or a question, at most
TURN_TOKENS = 80  # of a question with its answer, at most


@dataclasses.dataclass(frozen=True)
class Steps:
  """Updates of each run: the image encoder, the language model on texts, stage 1 and stage 2."""
  encoder: int
  words: int
  align: int
  instruct: int


@dataclasses.dataclass(frozen=True)
class Preset:
  """How large the study is.

  Attributes:
    train, test: how many scenes; `test` of each kind of unseen scenes.
    objects: the least and the most number of objects of a scene.
    grid: of the classical refiner.
    batch: rows of a batch, in every run.
    peak_lr: of every run that trains from scratch.
    rows: names of the rows that are run.
    seeds: how many times each row is run.
  """
  train: int
  test: int
  objects: tuple[int, int]
  grid: int
  batch: int
  peak_lr: float
  steps: Steps
  vision: ViTSettings
  former: MQFormerSettings
  llm: LlamaSettings
  rows: tuple[str, ...]
  seeds: int

  @property
  def spatial_length(self) -> int:
    return 1 + OBJECT_TOKENS * self.objects[1]

  @property
  def llm_length(self) -> int:
    return self.former.queries + TURN_TOKENS


def _former(width: int, layers: int, queries: int) -> MQFormerSettings:
  return MQFormerSettings(width=width, layers=layers, heads=width // 32, mlp_dim=2 * width, visual_queries=queries,
                          grounding_queries=queries, vocab_size=VOCABULARY, max_positions=320, dropout=0.0)


def _vision(width: int, layers: int) -> ViTSettings:
  return ViTSettings(image_size=64, patch_size=8, width=width, layers=layers, heads=width // 32, mlp_dim=2 * width)


def _llm(width: int, layers: int) -> LlamaSettings:
  heads = width // 32
  return LlamaSettings(vocab_size=VOCABULARY, width=width, layers=layers, heads=heads, kv_heads=heads,
                       mlp_dim=3 * width, lora=None)


MAIN_ROWS = ("full", "no_vit", "no_refiner", "lora", "frozen", "align_0", "prompt")

PRESETS = {
    "slice": Preset(
        train=256, test=32, objects=(2, 3), grid=4, batch=16, peak_lr=2e-3,
        steps=Steps(encoder=4, words=8, align=30, instruct=40), vision=_vision(32, 1), former=_former(64, 2, 4),
        llm=_llm(64, 2), rows=("full", "frozen"), seeds=1),
    "small": Preset(
        train=4000, test=128, objects=(2, 5), grid=4, batch=32, peak_lr=2e-3,
        steps=Steps(encoder=400, words=400, align=400, instruct=600), vision=_vision(64, 2), former=_former(64, 2, 8),
        llm=_llm(128, 2), rows=MAIN_ROWS, seeds=3),
    "full": Preset(
        train=50_000, test=1024, objects=(2, 8), grid=8, batch=256, peak_lr=1e-3,
        steps=Steps(encoder=2000, words=1000, align=2000, instruct=3000), vision=_vision(192, 6),
        former=_former(192, 6, 16), llm=_llm(256, 4),
        rows=(*MAIN_ROWS, "no_detector", "no_segmenter", "blind", "align_10", "noise"), seeds=3),
}
