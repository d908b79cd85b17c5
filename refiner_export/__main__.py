"""Exports pictures and texts as records, and looks at what was exported."""

from refiner_export.common.command import MISTAKE, Command, Commands, Flag
from refiner_export.common.out_of_memory import as_one_line
from refiner_export.common.settings import UserError
from refiner_export.export import beam, repair, stopping
from refiner_export.export import preview as dry_run
from refiner_export.export.config import ExportConfig
from refiner_export.export.run import ShardRange, export
from refiner_export.pages import gallery
from refiner_export.records import verify


def main(config: ExportConfig, shard_range: str, preview: int, random: int) -> int:
  """Exports on this machine. A stopped export keeps its finished shards, and exits with 128 plus the signal."""
  stopping.listen()
  try:
    if preview:
      print(dry_run.preview(config, preview, random or None), flush=True)
    else:
      with as_one_line(config.output):
        export(config, ShardRange.parse(shard_range))
  except KeyboardInterrupt as stopped:
    stopping.leave(128 + stopped.args[0], stopping.STOPPED)
  except UserError as error:
    stopping.leave(MISTAKE, f"error: {error}")
  return 0


EXPORT = Command(
    name="refiner_export export",
    about="Exports pictures and texts as records.\n\n"
          "A stopped export goes on from its finished shards when the same command is run again.",
    main=main,
    config=ExportConfig,
    flags=(Flag("shard-range", "shards to make, such as 10:20; whoever finds all finished completes the directory",
                default=":", metavar="START:STOP"),
           Flag("preview", "write no shard, but a page with so many examples: DIR/preview.html", default=0, at_least=0),
           Flag("random", "preview examples that are drawn at random, others for each number; 0 takes the first",
                default=0, metavar="SEED", at_least=0)),
    examples=("python -m refiner_export --config configs/export_quickstart.py --config.output=DIR",
              "python -m refiner_export --config configs/export_neural.py --preview 20 --random 1",
              "python -m refiner_export --config configs/export_neural.py --shard-range 10:20"),
)

COMMANDS = Commands(
    name="refiner_export",
    about=__doc__,
    commands={"export": EXPORT, "verify": verify.COMMAND, "repair": repair.COMMAND, "gallery": gallery.COMMAND,
              "beam": beam.COMMAND},
    default="export",
)

if __name__ == "__main__":
  COMMANDS.run()
