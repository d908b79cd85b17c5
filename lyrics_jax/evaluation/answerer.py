"""A trained stage-2 model that answers questions about records."""

from collections.abc import Sequence

import jax
import numpy as np

from lyrics_jax.config import Config, MeshConfig
from lyrics_jax.data.loader import collate, make_examples
from lyrics_jax.models.decode import greedy
from lyrics_jax.stages import make_stage
from lyrics_jax.training.checkpoint import open_run
from lyrics_jax.training.parameters import ParameterPlan
from lyrics_jax.training.sharding import global_batch, make_mesh
from refiner_export.record import Record
from refiner_export.settings import require


class Answerer:
  """Loads the newest checkpoint of a stage-2 run; `answer` decodes greedily, in batches of `batch_size`.

  Raises `UserError` when there is no such run.
  """

  def __init__(self, output: str, batch_size: int = 8, max_new_tokens: int = 96):
    checkpoints, self.config = open_run(output)
    require(self.config.stage == "instruct", f"{output} is a run of stage {self.config.stage}: only stage instruct answers questions")
    self.examples = make_examples(self.config)
    self.batch_size = batch_size
    stage = make_stage(self.config)
    plan = ParameterPlan.of(stage)
    self.mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])
    shardings = plan.shardings(self.mesh)
    like = {path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[path]) for path, s in plan.shapes.items()}
    trained, frozen = plan.split(like)
    self.parameters = checkpoints.restore_parameters(trained), checkpoints.restore_frozen(frozen)
    checkpoints.close()

    def generate(trained, frozen, batch):
      model = plan.model(trained, frozen)
      return greedy(model.llm, stage.embed(model, batch, None), batch["llm_mask"], max_new_tokens,
                    self.examples.llm_tokenizer.eos)

    self._generate = jax.jit(generate)

  def answer(self, questions: Sequence[tuple[Record, str]]) -> list[str]:
    """One answer per (record, question); a question may hold `<box K>` placeholders of its record."""
    answers = []
    for start in range(0, len(questions), self.batch_size):
      chunk = [self.examples.prompt(record, [text]) for record, text in questions[start:start + self.batch_size]]
      rows = len(chunk)
      batch = collate(chunk + chunk[:1] * (self.batch_size - rows))  # always full: one compilation
      del batch["ids"]
      with jax.set_mesh(self.mesh):
        tokens = np.asarray(self._generate(*self.parameters, global_batch(self.mesh, batch)))
      answers += [self.examples.llm_tokenizer.decode(row[row != self.examples.llm_tokenizer.eos]).strip() for row in tokens[:rows]]
    return answers
