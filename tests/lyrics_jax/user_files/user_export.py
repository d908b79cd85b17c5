"""Exports the user's source."""

from user_parts import ColourSquares

from refiner_export.export.config import ExportConfig, RunnerSettings
from refiner_export.refiners.classical.refiner import ClassicalRefiner


def get_config() -> ExportConfig:
  return ExportConfig("unused", ColourSquares(), ClassicalRefiner(grid=2), records_per_shard=3,
                      runner=RunnerSettings(workers=2))
