"""What travels between eight devices in a step of stage 1, read off the compiled program."""

import math
import re

import jax
import optax
import pytest
import tiny

from lyrics_jax.sharding import MeshSettings, global_batch, make_mesh
from lyrics_jax.training.step import initial_state, make_train_step

_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
BATCH = 16


def collectives(sizes, negatives):
  """What a compiled train step sends between devices, and the sizes of the pictures' frozen features.

  The first is {kind of collective: sizes in elements}.
  """
  config = tiny.make_config(batch_size=BATCH, mesh=MeshSettings(*sizes), stage__objectives__1__negatives=negatives)
  mesh = make_mesh(config.mesh)
  plan = tiny.make_plan(config)
  optimizer = optax.sgd(1e-2)
  trained, frozen = plan.initialise(mesh, 0)
  step = make_train_step(plan, optimizer, lambda _: 0.0, mesh)
  batch = global_batch(mesh, tiny.make_batch(config))
  with jax.set_mesh(mesh):
    state = initial_state(plan, optimizer, mesh, trained)
    program = step.lower(state, frozen, batch, jax.random.key(0)).compile().as_text()
  found = {}
  for result, kind in _COLLECTIVE.findall(program):
    elements = sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in _SHAPE.findall(result))
    found.setdefault(kind, []).append(elements)
  vision, local = config.stage.model.vision, config.stage.model.connector.local
  width = local.feature_width + 4  # and a box
  features = vision.tokens * vision.width, local.detection_rows * width, local.mask_rows * width
  return found, sorted(BATCH * size for size in features)


@pytest.fixture(scope="module")
def local():
  return collectives((8, 1, 1), "local")


@pytest.fixture(scope="module")
def globally():
  return collectives((8, 1, 1), "global")


def test_data_parallel_needs_gradients_and_features_only(local):
  """With local negatives: sums of gradients and losses, ITC features, captions' ids, the similarity.

  Nothing of a picture travels.
  """
  found, features = local
  assert set(found) <= {"all-reduce", "all-gather", "all-to-all"}
  assert found["all-reduce"] and found["all-gather"]
  assert max(found["all-gather"]) <= BATCH * 8 < features[0]  # [B, 8]: features of ITC, ids of a caption
  assert max(found.get("all-to-all", [0])) <= BATCH * BATCH  # the similarity, turned over


def test_global_negatives_move_frozen_features_once(globally, local):
  """Those of the whole batch. No gradient comes back but that of the parameters, of which two parts have now two."""
  found, features = globally
  assert sorted(found["all-gather"])[-len(features):] == features
  assert sum(found["all-reduce"]) < sum(local[0]["all-reduce"]) + 2 * features[-1]
