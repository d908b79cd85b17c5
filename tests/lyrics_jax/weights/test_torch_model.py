"""The PyTorch models compute what the JAX models compute, from the same parameters and inputs."""

import jax
import numpy as np
import pytest
import tiny
import torch
from published import given
from saved_run import random_parameters

from lyrics_jax.weights import hf_settings
from lyrics_jax.weights import lyrics_names
from lyrics_jax.weights.check import jax_outputs, torch_outputs
from lyrics_jax.torch_model.modeling_lyrics import LyricsForAlignment, LyricsForConditionalGeneration

TOLERANCE = 1e-4  # float32 in both, summed in another order; logits of size 1 to 10


def build(config, parameters) -> torch.nn.Module:
  """The PyTorch model with these parameters, through the table of names; LoRA left out."""
  kind = LyricsForAlignment if config.stage == "align" else LyricsForConditionalGeneration
  model = kind(kind.config_class(**hf_settings.model_settings(config, apart=False))).eval()
  entries = lyrics_names.entries(config.stage.model, tiny.make_plan(config).shapes)
  model.load_state_dict(given(entries, parameters))  # strict: every tensor has a place, every place a tensor
  return model


CASES = {  # besides the plain ones of test_check.py
    "align": ("align", {"former__activation": "gelu", "former__restart_positions": False,
                        "vision__kind": "eva", "stage__model__itc_pooling": "max"}),
    "instruct, grouped keys": ("instruct", {"llm__kv_heads": 1, "llm__rope_theta": 500.0}),
    "instruct, no text in the MQ-Former": ("instruct", {"connector__instruction": False,
                                                        "connector__spatial": False}),
    "instruct, one kind of queries": ("instruct", {"former__visual_queries": 4,
                                                   "former__grounding_queries": 0}),
}


@pytest.mark.parametrize("stage, changes", CASES.values(), ids=CASES)
def test_logits_agree(stage, changes):
  config = small.make_config(stage, **{"former__layers": 4, "former__cross_attention_frequency": 2,
                                      "llm__train": "full", **changes})
  plan = tiny.make_plan(config)
  parameters = random_parameters(plan)
  batch = tiny.make_batch(config, rows=3)
  batch["detection_mask"][0], batch["masks_mask"][0] = False, False  # a picture in which nothing was found
  model = lambda: plan.model(*plan.split(parameters))
  ours = jax.device_get(jax.jit(lambda batch: jax_outputs(plan.stage, model(), batch))(batch))
  theirs = torch_outputs(build(config, parameters), batch)
  assert ours.keys() == theirs.keys() and len(ours) >= 4
  for name, expected in ours.items():
    assert np.ptp(expected) > 0.1, name
    np.testing.assert_allclose(theirs[name], expected, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)
