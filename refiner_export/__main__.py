"""Exports records, or reads an exported directory again and says what is wrong with it.

python -m refiner_export --config configs/export_quickstart.py [--config.output=DIR ...] [--shard-range 10:20]
python -m refiner_export verify DIR
"""

import signal
import sys

from absl import flags

from refiner_export.records import verify
from refiner_export.export.config import ExportConfig
from refiner_export.export.run import ShardRange, export
from refiner_export.common.settings import define, run

_SHARD_RANGE = flags.DEFINE_string(
    "shard-range", ":", "Make only these shards, e.g. 10:20; whichever run finds all finished completes the directory.")


def _stop(number, _):
  raise KeyboardInterrupt(signal.Signals(number))


def main() -> None:
  for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, _stop)
  try:
    export(config.value, ShardRange.parse(_SHARD_RANGE.value))
  except KeyboardInterrupt as stopped:
    print("stopped; what is finished is kept, and the same command goes on from there", file=sys.stderr, flush=True)
    sys.exit(128 + stopped.args[0])


if __name__ == "__main__":
  if sys.argv[1:2] == ["verify"]:
    verify.run(sys.argv[2:])
  config = define(ExportConfig)
  run(main, config)
