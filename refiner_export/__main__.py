"""Exports pictures and texts as records, and looks at what was exported."""

import signal
import sys

from refiner_export.common.command import Command, Commands, Flag
from refiner_export.export import beam
from refiner_export.export.config import ExportConfig
from refiner_export.export.run import ShardRange, export
from refiner_export.pages import gallery
from refiner_export.records import verify


def main(config: ExportConfig, shard_range: str) -> int:
  """Exports on this machine. A stopped export keeps its finished shards, and exits with 128 plus the signal."""
  for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, _stop)
  try:
    export(config, ShardRange.parse(shard_range))
  except KeyboardInterrupt as stopped:
    print("stopped; what is finished is kept, and the same command goes on from there", file=sys.stderr, flush=True)
    return 128 + stopped.args[0]
  return 0


def _stop(number, _):
  raise KeyboardInterrupt(signal.Signals(number))


EXPORT = Command(
    name="refiner_export export",
    about="Exports pictures and texts as records.\n\n"
          "A stopped export goes on from its finished shards when the same command is run again.",
    main=main,
    config=ExportConfig,
    flags=(Flag("shard-range", "shards to make, such as 10:20; whoever finds all finished completes the directory",
                default=":", metavar="START:STOP"),),
    examples=("python -m refiner_export --config configs/export_quickstart.py --config.output=DIR",
              "python -m refiner_export --config configs/export_neural.py --shard-range 10:20"),
)

COMMANDS = Commands(
    name="refiner_export",
    about=__doc__,
    commands={"export": EXPORT, "verify": verify.COMMAND, "gallery": gallery.COMMAND, "beam": beam.COMMAND},
    default="export",
)

if __name__ == "__main__":
  COMMANDS.run()
