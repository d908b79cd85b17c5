"""What a person sees of the logs: the lines of both packages, and the warnings of everybody."""

import sys

from absl import logging

from refiner_export.common.settings import PACKAGES, ROOT

_OUR_FILES = tuple(str(ROOT / package) for package in PACKAGES)


def setup() -> None:
  """Shows information of the two packages only: Orbax alone would write forty lines for each checkpoint."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.addFilter(_is_shown)
  handler.python_handler.setFormatter(_Plain())
  handler.python_handler.setStream(sys.stderr)


def _is_shown(record) -> bool:
  return record.levelno >= 30 or record.pathname.startswith(_OUR_FILES)


class _Plain(logging.PythonFormatter):
  """`12:34:56 message`: a reader wants the time of day, not thread numbers."""

  def format(self, record):
    level = "" if record.levelno <= 20 else f"{record.levelname}: "
    return f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
