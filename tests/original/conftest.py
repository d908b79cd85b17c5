"""These tests need the environment of `make test-original`. In other environments they are not collected."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from refiner_export.refiners.base import UprightPicture

sys.path.append(str(pathlib.Path(__file__).parents[1] / "refiner_export"))  # models with random weights

_PACKAGES = "groundingdino", "segment_anything_hq"
collect_ignore_glob = [] if all(map(importlib.util.find_spec, _PACKAGES)) else ["test_*.py"]

SIZES = (90, 61), (61, 90)  # width and height


@pytest.fixture(scope="session")
def pictures() -> list[UprightPicture]:
  draw = np.random.default_rng(0)
  noise = [Image.fromarray(draw.integers(0, 255, (6, 6, 3), np.uint8)) for _ in SIZES]
  return [UprightPicture(image.resize(size, Image.Resampling.BICUBIC)) for image, size in zip(noise, SIZES)]
