"""The Apache Beam runner: an element is the number of a shard, and a Beam worker only makes that shard."""

from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from refiner_export.export.config import ExportConfig
from refiner_export.export.plan import ExportPlan
from refiner_export.export.shard import export_shard
from refiner_export.records.shard_files import ShardInfo


class ExportShard(beam.DoFn):
  """The number of a shard -> its `ShardInfo`. Beam may try a number twice, even at once: see `export_shard`."""

  def __init__(self, config: ExportConfig):
    self._config = config
    self._examples = Metrics.counter("refiner_export", "examples")
    self._skipped = Metrics.counter("refiner_export", "skipped")

  def process(self, number: int) -> Iterator[ShardInfo]:
    def advance(examples: int, skipped: int) -> None:
      self._examples.inc(examples)
      self._skipped.inc(skipped)

    yield export_shard(self._config, number, advance)


def run_with_beam(options: PipelineOptions, plan: ExportPlan, numbers: Sequence[int]) -> None:
  """Makes these shards in a pipeline, and waits for its end. Every worker must be able to reach source and output."""
  with beam.Pipeline(options=options) as pipeline:
    created = pipeline | "Number" >> beam.Create(list(numbers))
    # Beam fuses steps: without the reshuffle one worker would make all shards.
    created | "Spread" >> beam.Reshuffle() | "Export" >> beam.ParDo(ExportShard(plan.config))
