"""The small model of these tests: BLIP-2's activation and every second layer with cross-attention, two such groups."""

import pathlib

import pytest
import tiny
from own_environment import make_environment


@pytest.fixture
def make_config():
  """Keyword arguments as those of `tiny.make_config`."""
  def make(stage="align", **changes):
    return tiny.make_config(stage, **({"model__mq_former__activation": "gelu", "model__mq_former__layers": 4,
                                       "model__mq_former__cross_attention_frequency": 2} | changes))
  return make


@pytest.fixture(scope="session")
def python_alone(tmp_path_factory) -> pathlib.Path:
  """A Python that has torch and transformers, and nothing else of what this project is made with."""
  return make_environment(tmp_path_factory.mktemp("alone") / "environment")
