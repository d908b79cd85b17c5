"""The root of a run's configuration: typed dataclasses that are checked before anything else happens.

A file in `configs/` returns one `Config`; `--config.part.field=value` overrides any field. The settings of a part stand
beside what they build: the model's in `models/`, the objectives' in `objectives/`, the data's in `data/`. Defaults are
the published settings of the paper (arXiv 2312.05278).
"""

import dataclasses
from dataclasses import field

import jax

from lyrics_jax.data import batch
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.sharding import MeshSettings
from lyrics_jax.stage import Stage
from lyrics_jax.training.evaluations import EvaluationSettings
from lyrics_jax.training.optimizer import OptimizerSettings
from refiner_export.common.checks import at_least
from refiner_export.common.settings import Settings, require


@dataclasses.dataclass(unsafe_hash=True)
class Config(Settings):
  """One run of `python -m lyrics_jax.train`.

  Attributes:
    stage: what is trained, on which loss.
    output: directory of checkpoints, metrics and the saved configuration.
    init_from: what this run starts from: the output directory of an earlier run, or published weights, a file or a
      directory; see `weights/sources.py`.
    batch_size: global, over all hosts and microbatches.
    evaluations: what is measured while training, besides the losses.
  """
  stage: Stage
  output: str = ""
  init_from: str = ""
  seed: int = 0
  steps: int = 800_000
  batch_size: int = 512
  log_every: int = 100
  checkpoint_every: int = 1000
  keep_checkpoints: int = 2
  data: DataSettings = field(default_factory=DataSettings)
  optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
  compute: Compute = field(default_factory=Compute)
  mesh: MeshSettings = field(default_factory=MeshSettings)
  evaluations: tuple[EvaluationSettings, ...] = ()

  @property
  def microbatch(self) -> int:
    """Examples of one microbatch, over all hosts."""
    return self.batch_size // self.optimizer.accumulate_steps

  @property
  def dimensions(self) -> batch.Dimensions:
    """The sizes of a global batch."""
    data = self.data
    return batch.Dimensions(rows=self.batch_size, pictures=data.pictures, spatial=data.spatial_length,
                            caption=data.caption_length, conversation=data.llm_length, **self.stage.model.dimensions)

  @property
  def fields(self) -> batch.Fields:
    """The fields of a batch that this run reads."""
    return batch.select(self.stage.reads, self.stage.adds)

  def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of one global batch."""
    spec = {}
    for name, array in batch.spec(self.fields, self.dimensions).items():
      spec[name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return spec

  def check(self, path: str) -> None:
    require(bool(self.output), f"{path}.output is empty: name a directory for checkpoints")
    require(bool(self.data.records), f"{path}.data.records is empty: name a directory that refiner_export wrote")
    at_least(self, path, 1, "steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints")
    require(self.batch_size % self.optimizer.accumulate_steps == 0,
            f"{path}.batch_size={self.batch_size} is not a multiple of {path}.optimizer.accumulate_steps")
    fields = self.fields
    self.data.rows.check_fields(fields, self.stage.objectives)
    self.data.require_tokenizers(fields, f"{path}.data")
    self.stage.model.check_lengths(self.dimensions, f"{path}.stage.model")
    for objective in self.stage.objectives:
      objective.check_rows(self.microbatch, f"{path}.batch_size")
    for n, evaluation in enumerate(self.evaluations):
      evaluation.check_run(self, f"{path}.evaluations[{n}]")
