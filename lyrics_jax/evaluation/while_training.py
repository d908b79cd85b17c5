"""What a run evaluates while it trains, besides its losses: retrieval, in stage 1."""

from jax.sharding import Mesh

from lyrics_jax.evaluation.retriever import Retriever, retrieve
from lyrics_jax.training.parameters import ParameterPlan, Parameters
from refiner_export.records.reader import RecordDirectory


class WhileTraining:
  """Retrieval on config.align.retrieval_records every `retrieval_every` steps and after the last one; else nothing.

  A whole-mesh computation: on several hosts all of them call it at the same steps. It draws no random numbers and
  changes nothing, so that a run with it takes the same steps as one without.

  Args:
    fingerprint: the refiner of the training records, which must have made the held-out ones too, else `UserError`.
  """

  def __init__(self, plan: ParameterPlan, mesh: Mesh, fingerprint: str):
    self.config = plan.stage.config
    self.active = self.config.stage == "align" and bool(self.config.align.retrieval_records)
    if self.active:
      self.records = RecordDirectory(self.config.align.retrieval_records, fingerprint)
      self.retriever = Retriever(plan, mesh, self.config.batch_size // self.config.optimizer.accumulate_steps)

  def due(self, step: int) -> bool:
    return self.active and (step % self.config.align.retrieval_every == 0 or step == self.config.steps)

  def __call__(self, trained: Parameters, frozen: Parameters) -> dict[str, float]:
    """Metrics such as `retrieval/itc_i2t_r1`, see `retriever.retrieve`."""
    recalls = retrieve(self.retriever, (trained, frozen), self.records, self.config.align.retrieval_rerank)
    return {f"retrieval/{name}": value for name, value in recalls.items()}
