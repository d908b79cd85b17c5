"""The small model of these tests: BLIP-2's activation and every second layer with cross-attention, two such groups."""

import pathlib

import pytest
import small
from own_environment import make_environment


@pytest.fixture
def make_config():
  """Keyword arguments as those of `small.make_config`."""
  def make(stage="align", **changes):
    return small.make_config(stage, **({"former__activation": "gelu", "former__layers": 4,
                                        "former__cross_attention_frequency": 2} | changes))
  return make


@pytest.fixture(scope="session")
def python_alone(tmp_path_factory) -> pathlib.Path:
  """A Python that has torch and transformers, and nothing else of what this project is made with."""
  return make_environment(tmp_path_factory.mktemp("alone") / "environment")
