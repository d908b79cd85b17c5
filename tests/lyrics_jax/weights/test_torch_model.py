"""The PyTorch models compute what the JAX models compute, from the same parameters and inputs."""

import jax
import numpy as np
import pytest
import small
import tiny
import torch
from published import given
from saved_run import random_parameters

from lyrics_jax.torch_model import modeling_lyrics
from lyrics_jax.weights.check import torch_outputs
from lyrics_jax.weights.formats import format_of

TOLERANCE = 1e-4  # float32 in both, summed in another order; logits of size 1 to 10


def build(form, entries, parameters) -> torch.nn.Module:
  """The PyTorch model with these parameters, through the table of names; LoRA left out."""
  kind = getattr(modeling_lyrics, form.architecture)
  model = kind(kind.config_class(**form.settings())).eval()
  model.load_state_dict(given(entries, parameters))  # strict: every tensor has a place, every place a tensor
  return model


CASES = {  # besides the plain ones of test_check.py
    "align": ("align", {"former__activation": "gelu", "former__restart_positions": False,
                        "stage__model__itc_pooling": "max", **small.VIT_G}),
    "instruct, grouped keys": ("instruct", {"llm__kv_heads": 1, "llm__rope_theta": 500.0}),
    "instruct, no text in the MQ-Former": ("instruct", {"connector__instruction": False, "connector__spatial": False}),
    "instruct, one kind of queries": ("instruct", {"former__visual_queries": 4, "former__grounding_queries": 0}),
}


@pytest.mark.parametrize("stage, changes", CASES.values(), ids=CASES)
def test_logits_agree(stage, changes):
  config = small.make_config(stage, former__layers=4, former__cross_attention_frequency=2,
                             **(small.FULL if stage == "instruct" else {}), **changes)
  form, plan = format_of(config), tiny.make_plan(config)
  parameters = random_parameters(plan)
  batch = form.made_up_batch()
  for name in ("detection_mask", "masks_mask"):  # a picture in which nothing was found
    if name in batch:
      batch[name][0] = False

  def run(parameters, batch):
    return form.jax_outputs(plan.model(*plan.split(parameters)), batch)

  ours = jax.device_get(jax.jit(run)(plan.turned(parameters), batch))
  theirs = torch_outputs(form, build(form, form.entries(plan.shapes), parameters), batch)
  assert ours.keys() == theirs.keys() and len(ours) >= 4
  for name, expected in ours.items():
    assert np.ptp(expected) > 0.1, name
    np.testing.assert_allclose(theirs[name], expected, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)
