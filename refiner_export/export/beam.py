"""Exports records with Apache Beam, for example on Dataflow.

An element of the pipeline is the number of a shard. The command waits for the pipeline and completes the directory.
"""

import csv
import functools

from refiner_export.common.command import Command, Flag
from refiner_export.common.settings import UserError
from refiner_export.export.config import ExportConfig
from refiner_export.export.run import export


def export_with_beam(config: ExportConfig, beam_pipeline_options: str) -> None:
  """Exports everything; `beam_pipeline_options` are Beam's options with commas between them."""
  try:
    from apache_beam.options.pipeline_options import PipelineOptions
    from refiner_export.export.beam_pipeline import run_with_beam
  except ModuleNotFoundError as error:
    raise UserError(f"{error}: install the extra that has it: pip install 'lyrics_jax[beam]'") from None
  options = []
  for option in next(csv.reader([beam_pipeline_options]), []):
    options.append(f"--{option}")
  export(config, runner=functools.partial(run_with_beam, PipelineOptions(options)))


COMMAND = Command(
    name="refiner_export beam",
    about=__doc__,
    main=export_with_beam,
    config=ExportConfig,
    flags=(Flag("beam-pipeline-options", "Beam's options with commas between them", default="",
                metavar="NAME=VALUE,..."),),
    examples=("python -m refiner_export beam --config configs/export_neural.py --config.output=gs://bucket/records "
              "--beam_pipeline_options=runner=DataflowRunner,project=NAME",),
)

if __name__ == "__main__":
  COMMAND.run()
