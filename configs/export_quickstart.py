"""Twelve annotated photos that Python packages carry: no download, no accelerator, a few seconds."""

from refiner_export.export.config import ExportConfig
from refiner_export.sources.photos import Photos


def get_config() -> ExportConfig:
  return ExportConfig(output="runs/quickstart/records", source=Photos(), records_per_shard=4)
