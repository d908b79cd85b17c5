"""Attention weights against the model's own pass, and the figure of them."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from lyrics_jax.attention import attention
from lyrics_jax.data.images import View, to_cxcywh
from lyrics_jax.data.visual import visual_inputs
from lyrics_jax.evaluation import attention_picture
from lyrics_jax.evaluation.attention_maps import cross_attention_weights
from lyrics_jax.models.layers import attend, split_heads
from lyrics_jax.training.checkpoint import saved_config
from refiner_export.records.reader import RecordDirectory
from refiner_export.common.settings import UserError

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module", params=[1, 2])
def replayed(request):
  """(the model's queries, sources, replay, mixtures); mixtures are what the model's `attend` gives in each layer."""
  config = tiny.make_config("align", model__mq_former__cross_attention_frequency=request.param,
                            model__mq_former__layers=4, model__mq_former__grounding_queries=3)
  plan = tiny.make_plan(config)
  parameters, batch = tiny.make_parameters(plan, spread=0.3), tiny.make_batch(config)
  batch["detection_mask"][0], batch["masks_mask"][0] = False, False  # a picture without objects

  @jax.jit
  def run(batch):
    model = plan.model(*parameters)
    former = model.perception.mq_former
    sources = model.perception.look(batch)
    mask = jnp.broadcast_to(sources.grounding_valid[:, None, None], (8, 1, 3, 7))

    def step(group, queries, source, _):
      """A layer's own cross-attention outputs, before the output projection."""
      visual, grounding = source
      for n, layer in enumerate(group.layers):
        if n == 0:
          keys, values = layer.self_attention.keys_values(queries)
          hidden = layer.self_attention(queries, lambda query: attend(query, keys, values, None), None)
          mixtures = (attend(split_heads(layer.visual_attention.q(hidden[:, :2]), 2), *visual, None),
                      attend(split_heads(layer.grounding_attention.q(hidden[:, 2:]), 2), *grounding, mask))
        looks = lambda query: attend(query, *visual, None), lambda query: attend(query, *grounding, mask)
        queries = layer(queries, None, None, None, *(looks if n == 0 else (None, None)), None)[0]
      return queries, mixtures

    start = former.norm(jnp.broadcast_to(former.queries[...], (8, *former.queries.shape)))
    mixtures = former.stack.scan(step, start, (sources.visual, sources.grounding))[1]
    return former.query_pass(sources)[0], sources, cross_attention_weights(former, sources), mixtures

  return run(batch)


def test_the_replay_ends_where_the_model_does(replayed):
  queries, _, replay, _ = replayed
  np.testing.assert_allclose(replay.queries, queries, atol=1e-5)


def test_weights_times_values_are_the_layers_own_output(replayed):
  _, sources, replay, (visual, grounding) = replayed
  mix = lambda weights, values: np.einsum("gbhqt,gbthd->gbqhd", weights, values)
  np.testing.assert_allclose(mix(replay.visual, sources.visual[1]), visual, atol=1e-5)
  np.testing.assert_allclose(mix(replay.grounding, sources.grounding[1]), grounding, atol=1e-5)


def test_weights_are_shares_of_what_is_there(replayed):
  _, sources, replay, _ = replayed
  layers, valid = len(sources.visual[0]), np.asarray(sources.grounding_valid)
  assert replay.visual.shape == (layers, 8, 2, 2, 5) and replay.grounding.shape == (layers, 8, 2, 3, 7)
  assert replay.visual.dtype == replay.grounding.dtype == np.float32
  np.testing.assert_allclose(replay.visual.sum(-1), 1, atol=1e-6)
  expected = np.broadcast_to(valid.any(-1)[None, :, None, None], replay.grounding.shape[:-1])
  np.testing.assert_allclose(replay.grounding.sum(-1), expected, atol=1e-6)
  assert not np.asarray(replay.grounding)[np.broadcast_to(~valid[None, :, None, None], replay.grounding.shape)].any()


def test_tokens_know_their_objects(run, exported):
  record = RecordDirectory(exported)[0]
  inputs = visual_inputs(record, View(), saved_config(str(run)).model)
  inputs["detection"][3, -4:] = to_cxcywh(record.boxes[1:2])[0]
  found = attention_picture.tokens(record, inputs)
  rows, marked = found[:len(inputs["detection"])], found[len(inputs["detection"]):]
  assert 1 in [token.object for token in rows] and not any(token.mask for token in rows)
  for token in rows:
    if token.object is not None:
      np.testing.assert_allclose(token.box, record.boxes[token.object], atol=0.05)
  assert [token.object for token in marked] == [0, 1, 2, 3] and all(token.mask for token in marked)
  np.testing.assert_allclose([token.box for token in marked], record.boxes[:4], atol=1e-5)


def test_telling_queries():
  weights = np.array([[0.25, 0.25, 0.25, 0.25], [0.9, 0.1, 0, 0], [0.8, 0.2, 0, 0], [0, 0.1, 0.4, 0.5]])
  assert attention_picture.telling_queries(weights) == (1, 3)


def test_coverage_is_the_weight_of_the_boxes_on_a_point():
  tokens = [attention_picture.Token(np.array(box), None, False) for box in ([0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1])]
  heat = attention_picture._coverage(np.array([0.2, 0.5, 0.3]), tokens)
  quarters = heat[::len(heat) - 1, ::len(heat) - 1]
  np.testing.assert_allclose(quarters, [[0.7, 0.2], [0.2, 0.5]], atol=1e-6)


@pytest.mark.parametrize("refined", [True, False])
def test_the_figure(run, exported, tmp_path, capsys, refined):
  """Also of a model whose grounding queries have nothing to look at."""
  output = tmp_path / "attention.png"
  if refined:
    attention(str(run), f"{exported}#1", str(output))
    assert capsys.readouterr().out == f"attention of camera: {output}\n"
  else:
    record, model = RecordDirectory(exported)[1], saved_config(str(run)).model
    blank = {name: value if name == "image" else np.zeros_like(value)
             for name, value in visual_inputs(record, View(), model).items()}
    visual = np.full((1, 2, 2, 5), 0.2, np.float32)
    output.write_bytes(attention_picture.draw(record, blank, visual, np.zeros((1, 2, 2, 20), np.float32), 2, "$title"))
  with Image.open(output) as picture:
    assert picture.format == "PNG" and picture.width == (1800 if refined else 900)
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
  assert [path.name for path in tmp_path.iterdir()] == ["attention.png"]


@pytest.mark.parametrize("arguments, message", [
    ({"checkpoint": ""}, "--checkpoint is required"),
    ({"checkpoint": "/nowhere"}, "run not found: /nowhere"),
    ({"record": ""}, "--record is required"),
    ({"record": "records"}, "--record=records: expected DIR#K"),
    ({"record": "/nowhere#0"}, "no manifest.json in /nowhere"),
    ({"output": ""}, "--output is required"),
    ({"output": "picture.jpg"}, "--output=picture.jpg: the figure is a PNG"),
    ({"output": "/nowhere/picture.png"}, "directory of --output not found: /nowhere")])
def test_mistakes(run, exported, arguments, message):
  with pytest.raises(UserError) as raised:
    attention(**{"checkpoint": str(run), "record": f"{exported}#0", "output": "picture.png"} | arguments)
  assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_record_out_of_range(run, exported):
  with pytest.raises(UserError, match=f"#3: {exported} holds records 0 to 2"):
    attention(str(run), f"{exported}#3", "picture.png")


def test_a_mistake_on_the_command_line():
  line = [sys.executable, "-m", "lyrics_jax.attention", "--checkpoint=/nowhere", "--record=records#0", "--output=a.png"]
  result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == 2 and result.stdout == ""
  assert result.stderr.startswith("error: run not found: /nowhere") and result.stderr.count("\n") == 1
