"""Answers of a model to questions about records."""

from collections.abc import Sequence

import jax
import numpy as np

from lyrics_jax.data.batch import Batch
from lyrics_jax.data.buckets import cut_to, lengths_of
from lyrics_jax.data.loader import collate
from lyrics_jax.inference.decode import greedy
from lyrics_jax.inference.loaded import LoadedModel, require_model
from lyrics_jax.models.vlm import VLM, VLMSettings
from refiner_export.records.record import Record


class Generator:
  """Decodes greedily, in batches that are always full: one compilation for each length of prompts.

  On several hosts all hosts ask the same questions and get the same answers.

  Args:
    batch_size: questions at a time; raised to the next multiple that the mesh divides.
    max_new_tokens: the most tokens of an answer.

  Raises:
    UserError: the model does not generate text, or a tokenizer is missing.
  """

  def __init__(self, loaded: LoadedModel, batch_size: int = 8, max_new_tokens: int = 96):
    require_model(loaded.config, VLMSettings, "generating text")
    config = self.config = loaded.config
    self.batch_size = loaded.rows(batch_size)
    self.max_new_tokens = max_new_tokens
    self._examples = config.data.rows.examples(config.data, config.fields, config.dimensions, config.stage.objectives)
    self._tokenizer = self._examples.tokenizers.llm
    self._decode = loaded.compiled(self._greedy)

  def answer(self, questions: Sequence[tuple[Record, str]]) -> list[str]:
    """One answer per (record, question); a question may hold `<box I.K>` placeholders of its record.

    Raises:
      UserError: a question does not fit into config.data.llm_length.
    """
    answers = []
    for start in range(0, len(questions), self.batch_size):
      answers += self._answer(questions[start:start + self.batch_size])
    return answers

  def _answer(self, questions: Sequence[tuple[Record, str]]) -> list[str]:
    """The answers of at most one batch."""
    prompts = [self._examples.prompt(record, [text]) for record, text in questions]
    filling = prompts[:1] * (self.batch_size - len(prompts))
    batch = collate(prompts + filling)
    del batch["records"]
    batch = cut_to(lengths_of(self.config.fields, self.config.data.buckets, batch), batch)
    tokens = np.asarray(self._decode(batch))
    answers = []
    for row in tokens[:len(prompts)]:
      words = row[row != self._tokenizer.eos]
      answers.append(self._tokenizer.decode(words).strip())
    return answers

  def _greedy(self, model: VLM, batch: Batch) -> jax.Array:
    return greedy(model.llm, model.embed(batch, None), batch["segments"] > 0, self.max_new_tokens, self._tokenizer.eos)
