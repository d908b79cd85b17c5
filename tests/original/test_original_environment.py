"""The environment of constraints-original.txt is enough to export. It has no JAX and an older transformers."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import dataclasses
import configs.export_neural as published
from refiner_export.refiners.originals.grounding_dino import OriginalGroundingDino
from refiner_export.refiners.originals.sam_hq import OriginalSamHQ


def get_config():
  config = published.get_config()
  config.refiner.detector = OriginalGroundingDino(**dataclasses.asdict(config.refiner.detector))
  config.refiner.segmenter = OriginalSamHQ(**dataclasses.asdict(config.refiner.segmenter))
  for part in (config.refiner.tagger, config.refiner.detector):
    part.checkpoint = __file__
  config.refiner.tagger.tag_list = config.refiner.tagger.thresholds = "numbers.txt"
  config.refiner.detector.tokenizer = "."
  return config
"""


def test_the_exporter_takes_the_authors_packages_from_a_configuration(tmp_path):
  """The command ends at the first missing file. The segmenter's file is missing, and it is checked last."""
  (tmp_path / "config.py").write_text(CONFIG)
  (tmp_path / "numbers.txt").write_text("0.5\n")
  (tmp_path / "vocab.txt").write_text("[PAD]\n")
  result = subprocess.run([sys.executable, "-m", "refiner_export", "--config", str(tmp_path / "config.py")],
                          cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
  assert result.returncode == 2 and result.stderr.splitlines()[-1] == (
      "error: config.refiner.segmenter.checkpoint: checkpoints/sam_hq_vit_h.pth is not a file. Name the file "
      "sam_hq_vit_h.pth (or _l, _b) of the SAM-HQ project's release")
