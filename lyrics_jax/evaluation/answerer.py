"""A trained stage-2 model that answers questions about records."""

from collections.abc import Sequence

import numpy as np

from lyrics_jax.data.loader import collate, make_examples
from lyrics_jax.evaluation.trained import TrainedModel
from lyrics_jax.models.decode import greedy
from refiner_export.records.record import Record


class Answerer:
  """Loads the newest checkpoint of a stage-2 run; `answer` decodes greedily, in batches of `batch_size`.

  Raises `UserError` when there is no such run.
  """

  def __init__(self, output: str, batch_size: int = 8, max_new_tokens: int = 96):
    trained = TrainedModel(output, "instruct")
    self.config = trained.config
    self.examples = make_examples(self.config)
    self.batch_size = batch_size
    self._generate = trained.compiled(
        lambda model, batch: greedy(model.llm, trained.stage.embed(model, batch, None), batch["llm_mask"], max_new_tokens,
                                    self.examples.llm_tokenizer.eos))

  def answer(self, questions: Sequence[tuple[Record, str]]) -> list[str]:
    """One answer per (record, question); a question may hold `<box K>` placeholders of its record."""
    answers = []
    for start in range(0, len(questions), self.batch_size):
      chunk = [self.examples.prompt(record, [text]) for record, text in questions[start:start + self.batch_size]]
      rows = len(chunk)
      batch = collate(chunk + chunk[:1] * (self.batch_size - rows))  # always full: one compilation
      del batch["ids"]
      tokens = np.asarray(self._generate(batch))
      answers += [self.examples.llm_tokenizer.decode(row[row != self.examples.llm_tokenizer.eos]).strip() for row in tokens[:rows]]
    return answers
