"""Cross-attention weights against the model's own pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lyrics_jax.models.connectors.cross_attention_weights import CrossAttention, cross_attention_weights
from lyrics_jax.models.connectors.key_values import PictureKeyValues, Seen
from lyrics_jax.models.connectors.mq_former import MQFormer, MQFormerSettings
from lyrics_jax.models.layers.compute import Compute

PICTURES, PATCHES, LOCAL, IMAGE_WIDTH = 8, 5, 7, 12


@dataclasses.dataclass
class Replayed:
  """`queries`: those of the model. `found`: what its `Seen.attend` gave, kind by kind, [G, B, Q, H, d]."""
  queries: jax.Array
  pictures: PictureKeyValues
  weights: CrossAttention
  found: list[np.ndarray]


def make_former(**changes) -> MQFormer:
  """With noise on all parameters, so that everything differs from everything."""
  settings = MQFormerSettings(width=16, layers=4, heads=2, mlp_dim=32, visual_queries=2, vocab_size=48,
                              max_positions=32, dropout=0.0, **changes)
  rng = np.random.default_rng(0)
  graph, state = nnx.split(MQFormer(settings, IMAGE_WIDTH, Compute(dtype="float32"), rngs=nnx.Rngs(0)))
  return nnx.merge(graph, jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(a.dtype), state))


@pytest.fixture(scope="module", params=[(1, 3), (2, 3), (2, 0)])
def replayed(request) -> Replayed:
  frequency, grounding_queries = request.param
  former = make_former(cross_attention_frequency=frequency, grounding_queries=grounding_queries)
  rng = np.random.default_rng(1)
  image = jnp.asarray(rng.standard_normal((PICTURES, PATCHES, IMAGE_WIDTH)), jnp.float32)
  local = valid = None
  if grounding_queries:
    local = jnp.asarray(rng.standard_normal((PICTURES, LOCAL, 16)), jnp.float32)
    valid = rng.random((PICTURES, LOCAL)) < 0.7
    valid[0] = False  # a picture without objects
    valid = jnp.asarray(valid)
  pictures = former.key_values(image, local, valid)
  found = []
  attend = Seen.attend

  def recorded(seen: Seen, query: jax.Array) -> jax.Array:
    out = attend(seen, query)
    jax.debug.callback(lambda value: found.append(np.asarray(value)), out, ordered=True)
    return out

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Seen, "attend", recorded)
    queries, _ = former.query_pass(pictures)
    jax.effects_barrier()
  kinds = 2 if grounding_queries else 1
  by_kind = [np.stack(found[kind::kinds]) for kind in range(kinds)]
  return Replayed(queries, pictures, cross_attention_weights(former, pictures), by_kind)


def test_the_replay_ends_where_the_model_does(replayed):
  np.testing.assert_allclose(replayed.weights.queries, replayed.queries, atol=1e-5)


def test_weights_times_values_are_what_the_layers_found(replayed):
  weights, pictures = replayed.weights, replayed.pictures
  kinds = [(weights.visual, pictures.visual), (weights.grounding, pictures.grounding)]
  for (shares, key_values), found in zip(kinds, replayed.found):
    assert len(shares) == len(found) >= 2
    np.testing.assert_allclose(np.einsum("gbhqt,gbthd->gbqhd", shares, key_values[1]), found, atol=1e-5)


def test_weights_are_shares_of_what_is_there(replayed):
  visual, grounding = np.asarray(replayed.weights.visual), np.asarray(replayed.weights.grounding)
  layers = len(replayed.pictures.visual[0])
  assert visual.shape == (layers, PICTURES, 2, 2, PATCHES) and visual.dtype == grounding.dtype == np.float32
  np.testing.assert_allclose(visual.sum(-1), 1, atol=1e-6)
  if replayed.pictures.grounding is None:
    assert grounding.shape == (layers, PICTURES, 2, 0, 0)
    return
  valid = np.asarray(replayed.pictures.grounding_valid)
  assert grounding.shape == (layers, PICTURES, 2, 3, LOCAL)
  expected = np.broadcast_to(valid.any(-1)[None, :, None, None], grounding.shape[:-1])
  np.testing.assert_allclose(grounding.sum(-1), expected, atol=1e-6)
  assert not grounding[np.broadcast_to(~valid[None, :, None, None], grounding.shape)].any()
