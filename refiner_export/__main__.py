"""python -m refiner_export --config configs/export_quickstart.py [--config.output=DIR ...]"""

from refiner_export.config import ExportConfig
from refiner_export.run import export
from refiner_export.settings import define, run

if __name__ == "__main__":
  config = define(ExportConfig)
  run(lambda: export(config.value), config)
