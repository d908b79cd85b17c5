"""The runs of the study as configurations: what every run shares, the parts that are trained first, and both stages."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.pairs import Pairs
from lyrics_jax.data.rows import Rows
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.data.templates import VicunaV1
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.models.connectors.local_tokens import LocalTokensSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.icg import ICG
from lyrics_jax.objectives.itc import ITC
from lyrics_jax.objectives.itm import ITM
from lyrics_jax.objectives.msp import MSP
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.stage import Stage
from lyrics_jax.study.places import Places
from lyrics_jax.study.presets import SENTENCE_TOKENS, Preset
from lyrics_jax.study.rows import CLEAN, Row
from lyrics_jax.study.start import Piece
from lyrics_jax.training.optimizer import OptimizerSettings

SHARED = "parts"  # in place of a row: the directory of the runs that all rows start from

_ALIGNER = ("connector/*", "itc_*", "temperature", "itm/*", "lm_head/*")
_REFINER = ("detection", "masks", "spatial")


@dataclasses.dataclass(frozen=True)
class Run:
  """A run and what it starts from."""
  config: Config
  pieces: tuple[Piece, ...] = ()


@dataclasses.dataclass(frozen=True)
class Runs:
  """Makes the runs of a study."""
  preset: Preset
  places: Places

  def encoder(self) -> Run:
    """The image encoder, trained with all else by the contrast of pictures and captions, as CLIP was."""
    config = self._config(self.places.run(SHARED, 0, "encoder"), self._aligner((ITC(),), ("*",)),
                          self.preset.steps.encoder, Pairs(), CLEAN)
    config.data.blank = _REFINER
    return _checked(config)

  def words(self) -> Run:
    """The language model, trained on the conversations without seeing anything, as Vicuna was trained on texts."""
    config = self._config(self.places.run(SHARED, 0, "words"), self._vlm(("llm/*",)), self.preset.steps.words,
                          self._conversations(), CLEAN)
    config.data.blank = ("image", *_REFINER)
    return _checked(config)

  def align(self, row: Row, seed: int) -> Run | None:
    """Stage 1; None for a row that has none."""
    steps = round(row.align_share * self.preset.steps.align)
    if not steps:
      return None
    objectives = ITC(), ITM(), ICG(), MSP()
    config = self._config(self.places.run(row.stage_1.name, seed, "align"), self._aligner(objectives, _ALIGNER), steps,
                          Pairs(), row.refiner)
    config.seed = seed
    return _checked(config, row.align, Piece(self.places.run(SHARED, 0, "encoder"), "vision/*"))

  def instruct(self, row: Row, seed: int) -> Run:
    """Stage 2: the encoder and the connector of stage 1, and the language model that has read texts."""
    config = self._config(self.places.run(row.name, seed, "instruct"), self._vlm(("connector/*", "llm/*")),
                          self.preset.steps.instruct, self._conversations(), row.refiner)
    config.seed = seed
    pieces = [Piece(self.places.run(SHARED, 0, "encoder"), "vision/*"),
              Piece(self.places.run(SHARED, 0, "words"), "llm/*")]
    if self.align(row, seed) is not None:
      pieces.append(Piece(self.places.run(row.stage_1.name, seed, "align"), "connector/*"))
    return _checked(config, row.instruct, *pieces)

  def _config(self, output: str, stage: Stage, steps: int, rows: Rows, refiner: str) -> Config:
    preset, places = self.preset, self.places
    data = DataSettings(
        records=places.records(refiner, "train"), rows=rows,
        mq_former_tokenizer=f"{places.tokenizers}/mq_former", llm_tokenizer=f"{places.tokenizers}/llm",
        spatial_length=preset.spatial_length, caption_length=SENTENCE_TOKENS, llm_length=preset.llm_length,
        buckets=(1.0,), crop_scale=(1.0, 1.0), flip=False)
    return Config(
        stage=stage, output=output, steps=steps, batch_size=preset.batch, log_every=min(20, steps),
        checkpoint_every=max(steps // 4, 1), keep_checkpoints=1, data=data,
        compute=Compute(dtype="float32", frozen_dtype="float32", remat="dots"),
        optimizer=OptimizerSettings(peak_lr=preset.peak_lr, warmup_fraction=0.1))

  def _connector(self) -> QFormerSettings:
    preset = self.preset
    local = LocalTokensSettings(detection_rows=preset.grid ** 2, mask_rows=preset.objects[1])
    return QFormerSettings(former=dataclasses.replace(preset.former), local=local)

  def _aligner(self, objectives: tuple, train: tuple[str, ...]) -> Stage:
    vision = dataclasses.replace(self.preset.vision)
    return Stage(AlignerSettings(vision, self._connector(), itc_width=64), objectives, train)

  def _vlm(self, train: tuple[str, ...]) -> Stage:
    vision, llm = dataclasses.replace(self.preset.vision), dataclasses.replace(self.preset.llm)
    return Stage(VLMSettings(vision, self._connector(), llm), (NextToken(),), train)

  def _conversations(self) -> Conversations:
    return Conversations(template=VicunaV1(system_message="A chat about a picture."))


def _checked(config: Config, changes: Mapping[str, Any] = {}, *pieces: Piece) -> Run:
  """The run with the changes of a row, given by dotted fields."""
  for field, value in changes.items():
    *parts, last = field.split(".")
    settings = config
    for part in parts:
      settings = getattr(settings, part)
    setattr(settings, last, value)
  config.finalize()
  return Run(config, pieces)
