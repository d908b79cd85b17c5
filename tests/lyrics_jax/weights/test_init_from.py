"""`config.init_from`: what the source has is in the first parameters, the rest is as initialised, and all is said."""

import logging

import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
import tiny
import torch
from absl import logging as absl_logging
from lavis_layout import WORDS, image_encoder, q_former, random_clip

from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.initialise import initial_parameters
from lyrics_jax.weights.sources import find
from refiner_export.common.settings import UserError


@pytest.fixture
def start(make_config, tmp_path):
  """The first parameters of a run that starts from `init_from`, as checkpoints have them."""
  checkpoints = Checkpoints(str(tmp_path / "run"))

  def start(init_from, stage="align", **changes):
    config = make_config(stage, init_from=str(init_from), **changes)
    plan = tiny.make_plan(config)
    origin = find(config.init_from, plan) if config.init_from else None
    trained, frozen = initial_parameters(plan, tiny.one_device_mesh(config), checkpoints, origin)
    assert list(trained) == plan.paths(True) and list(frozen) == plan.paths(False)
    parameters = plan.turned(trained | frozen)
    for path, value in parameters.items():
      assert (value.shape, value.dtype) == (plan.shapes[path].shape, plan.shapes[path].dtype), path
    return {path: np.asarray(value, np.float32) for path, value in parameters.items()}

  yield start
  checkpoints.close()


@pytest.fixture
def log(caplog):
  absl_logging.use_absl_handler()
  caplog.set_level(logging.INFO, logger="absl")
  return caplog


def test_from_lavis(start, make_config, tmp_path, log):
  config = make_config()
  tensors = q_former(config) | image_encoder(random_clip(config))
  torch.save({"model": tensors}, tmp_path / "blip2.pth")
  fresh = start("")
  got = start(tmp_path / "blip2.pth", compute__frozen_dtype="bfloat16")
  visual = config.stage.model.connector.former.visual_queries
  queries, words, attention = ("connector/former/" + name for name in (
      "queries", "words/embedding", "stack/blocks/layers/0/grounding_attention/q/kernel"))
  np.testing.assert_array_equal(got[queries][:visual], tensors["query_tokens"][0])
  np.testing.assert_array_equal(got[queries][visual:], fresh[queries][visual:])
  np.testing.assert_array_equal(got[words][:WORDS], tensors["Qformer.bert.embeddings.word_embeddings.weight"])
  np.testing.assert_array_equal(got[words][WORDS:], fresh[words][WORDS:])
  np.testing.assert_array_equal(got[attention], fresh[attention])
  np.testing.assert_allclose(got["vision/class_token"], tensors["visual_encoder.class_embedding"], rtol=1e-2)
  assert "former/grounding_attention                     0" in log.text
  assert "left over, contrastive heads, which here read two pooled vectors: vision_proj (2), text_proj (2)" in log.text
  assert not [record for record in log.records if record.levelno >= logging.WARNING]


def test_what_is_unknown_or_at_random_is_warned_of(start, make_config, tmp_path, log):
  tensors = q_former(make_config()) | {"adapter.weight": torch.zeros(2)}
  torch.save({"model": tensors}, tmp_path / "blip2.pth")
  start(tmp_path / "blip2.pth")
  warnings = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
  assert len(warnings) == 2
  assert "unknown, and not loaded: adapter.weight" in warnings[0]
  assert "frozen with random values" in warnings[1] and warnings[1].endswith("vision")


def test_from_an_earlier_run(start, make_config, tmp_path, log):
  earlier = make_config(output=str(tmp_path / "earlier"))
  plan = tiny.make_plan(earlier)
  trained, frozen = map(plan.turned, tiny.make_parameters(plan, seed=5, spread=0.1))
  checkpoints = Checkpoints(earlier.output)
  checkpoints.manager.save(1, args=ocp.args.Composite(parameters=ocp.args.StandardSave(trained)))
  checkpoints.save_frozen(plan.turned(frozen), plan)
  checkpoints.close()
  (tmp_path / "earlier" / "config.json").write_text(earlier.to_json())
  got = start(earlier.output, "instruct", **small.FULL)
  assert {path.split("/")[0] for path in got} == {"vision", "connector", "llm"}
  for path in got:
    if not path.startswith(("llm/", "connector/projection/")):
      np.testing.assert_array_equal(got[path], (trained | frozen)[path], err_msg=path)
  assert "left over, without a place in this model: itc_image (2), itc_text (2), itm (2), lm_head (5)" in log.text


def test_nothing_there(start, tmp_path):
  with pytest.raises(UserError, match="config.init_from not found: .*nowhere.pth. Name the output directory of"):
    start(tmp_path / "nowhere.pth")
