"""python -m refiner_export.export.beam --config FILE [--config.output=DIR] [--beam_pipeline_options=runner=DataflowRunner,...]

The Apache Beam runner: an element is the number of a shard, and making it is all that a Beam worker does.
"""

import functools
from collections.abc import Iterator, Sequence

import apache_beam as beam
from absl import flags
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from refiner_export.export.config import ExportConfig
from refiner_export.export.plan import Plan
from refiner_export.export.shard import export_shard
from refiner_export.records.shard_files import ShardInfo


class ExportShard(beam.DoFn):
  """The number of a shard -> its `ShardInfo`. Beam may try a number twice, even at once: see `export_shard`."""

  def __init__(self, config: ExportConfig):
    self._config = config
    self._pictures, self._skipped = (Metrics.counter("refiner_export", name) for name in ("pictures", "skipped"))

  def process(self, number: int) -> Iterator[ShardInfo]:
    def advance(pictures: int, skipped: int) -> None:
      self._pictures.inc(pictures)
      self._skipped.inc(skipped)

    yield export_shard(self._config, number, advance)


def run_with_beam(options: PipelineOptions, plan: Plan, numbers: Sequence[int]) -> None:
  """Makes these shards in a pipeline, and waits for its end. Source and output must be in every worker's reach."""
  with beam.Pipeline(options=options) as pipeline:
    created = pipeline | "Number" >> beam.Create(list(numbers))
    # Else they would stay together: Beam fuses steps, and one worker would make all shards.
    created | "Spread" >> beam.Reshuffle() | "Export" >> beam.ParDo(ExportShard(plan.config))


def main() -> None:
  from refiner_export.export.run import export
  from refiner_export.common.settings import define, run

  options = flags.DEFINE_list(
      "beam_pipeline_options", [], "Beam's options with commas between them, e.g. runner=DataflowRunner,project=NAME.")
  config = define(ExportConfig)

  def with_options() -> None:
    export(config.value, runner=functools.partial(
        run_with_beam, PipelineOptions([f"--{option}" for option in options.value])))

  run(with_options, config)


if __name__ == "__main__":
  from refiner_export.export.beam import main as importable_main  # what `__main__` defines, Beam's workers cannot import
  importable_main()
