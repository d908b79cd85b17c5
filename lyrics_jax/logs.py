"""What a person sees of the logs: this project's lines, and everybody's warnings."""

import pathlib
import sys

from absl import logging

_OURS = tuple(str(pathlib.Path(__file__).parents[1] / package) for package in ("lyrics_jax", "refiner_export"))


def setup() -> None:
  """Shows information of this project's own files only: Orbax alone would write forty lines per checkpoint."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(lambda record: record.levelno >= 30 or record.pathname.startswith(_OURS))
  logging.get_absl_handler().python_handler.setFormatter(_Plain())
  logging.get_absl_handler().python_handler.setStream(sys.stderr)


class _Plain(logging.PythonFormatter):
  """`12:34:56 message`: who reads along wants the time of day, not thread numbers."""

  def format(self, record):
    level = "" if record.levelno <= 20 else f"{record.levelname}: "
    return f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
