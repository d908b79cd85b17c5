"""The neural refiner at a size for tests: three networks with random weights, in files of the published form."""

import pathlib

import pytest
import tiny_sam_hq
import torch
from tiny_models import TINY_BUDGET, TINY_QUERIES, randomise, tiny_grounding_dino

from refiner_export.refiners.ram_plus import tagger as ram_plus_tagger
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.grounding_dino.detector import GroundingDino
from refiner_export.refiners.neural import NeuralRefiner
from refiner_export.refiners.ram_plus.model import RamPlusConfig, RamPlusModel
from refiner_export.refiners.ram_plus.tagger import RamPlus
from refiner_export.refiners.sam_hq.segmenter import SamHQ
from refiner_export.refiners.ram_plus.swin import SwinConfig

TAGS = "cat", "Dog", "red car", "tree", "house", "persons", "St. Bernard"
_RAM_PLUS = RamPlusConfig(SwinConfig(width=8, heads=(1, 2, 2), depths=(1, 2, 1), image_size=64, window=4),
                          tags=len(TAGS), descriptions=3, text_width=12, width=16)


@pytest.fixture(scope="module")
def tiny_ram_plus_size():
  """Makes `swin_l` the size of the checkpoint that `tiny_refiner` writes."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(ram_plus_tagger._CONFIGS, "swin_l", _RAM_PLUS)
    yield


@pytest.fixture(scope="module")
def one_thread():
  """For models this small, threads that wait for each other take longer than the models."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


def tiny_refiner(
    folder: pathlib.Path, queries: int = TINY_QUERIES, budget: int = TINY_BUDGET, tag_threshold: float = 0.5,
    **detector,
) -> NeuralRefiner:
  """Writes the files into the folder and returns the settings. Every network takes two pictures at once.

  Args:
    folder: where the files go.
    queries: rows of the detector.
    budget: tokens in a caption of the detector.
    tag_threshold: the threshold of every tag.
    detector: settings of the detector that replace those for pictures of 64 pixels.
  """
  torch.save({"model": _ram_plus_weights()}, folder / "ram_plus.pth")
  (folder / "tags.txt").write_text("\n".join(TAGS) + "\n")
  (folder / "thresholds.txt").write_text(f"{tag_threshold}\n" * len(TAGS))
  refiner = NeuralRefiner(
      RamPlus(*(str(folder / name) for name in ("ram_plus.pth", "tags.txt", "thresholds.txt")), batch=2),
      GroundingDino(str(tiny_grounding_dino(folder / "grounding_dino", queries, budget)), batch=2,
                    **{"box_threshold": 0.3, "text_threshold": 0.3, "shortest": 64, "longest": 128, **detector}),
      SamHQ(tiny_sam_hq.write_official(folder / "sam_hq.pth", tiny_sam_hq.weights()), batch=2, box_batch=3),
      Compute(device="cpu"))
  refiner.finalize("config.refiner")
  return refiner


def _ram_plus_weights() -> dict[str, torch.Tensor]:
  """Random weights by the official names."""
  model = RamPlusModel(_RAM_PLUS)
  randomise(model, seed=0)
  with torch.no_grad():
    model.fc.weight *= 8  # otherwise every score is near one half
  return {name.replace("tagging_head", "vision_multi"): tensor for name, tensor in model.state_dict().items()}
