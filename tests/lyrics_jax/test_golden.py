"""Losses, gradients and fresh parameters equal to 1e-6 what the first revision of the code made of the same inputs.

`golden/values.json` and the batches beside it were written by that revision, under its own names.
"""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lyrics_jax.training.old_names import renamed
from lyrics_jax.training.parameters import ModelParameters

FOLDER = pathlib.Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "values.json").read_text())
FORMER = "stage__model__connector__former__"
CASES = {
    "align": ("align", {}, None),
    "align_dropout": ("align", {f"{FORMER}dropout": 0.1}, 7),
    "align_max": ("align", {"stage__model__itc_pooling": "max", "stage__objectives__1__negatives": "local",
                            f"{FORMER}cross_attention_frequency": 2, f"{FORMER}activation": "gelu",
                            f"{FORMER}restart_positions": False}, 3),
    "instruct": ("instruct", {}, None),
    "instruct_dropout": ("instruct", {f"{FORMER}dropout": 0.1, "stage__model__llm__lora__dropout": 0.1}, 7),
    "instruct_full": ("instruct", {"stage__train": tiny.FULL, "stage__model__llm__lora": None,
                                   "stage__objectives__0__chunk": 5, "stage__model__connector__instruction": False,
                                   "stage__model__connector__spatial": False}, 3),
}
BATCH_NAMES = {"llm_ids": "ids", "llm_mask": "segments", "llm_targets": "targets", "image_slot": "slot"}


def noise(path: str, shape: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)


def old_batch(stage: str, config) -> dict[str, np.ndarray]:
  """The stored batch under today's names, with an axis for the one picture of a row."""
  stored = np.load(FOLDER / f"{stage}_batch.npz")
  rows = len(stored["image"])
  batch = {"picture_mask": np.ones((rows, 1), bool), "picture_id": np.arange(rows, dtype=np.int32)[:, None]}
  for name, value in stored.items():
    new = BATCH_NAMES.get(name, name)
    value = value.astype(np.int32) if new == "segments" else value
    batch[new] = value[:, None] if "pictures" in config.fields.get(new, config.fields["image"]).dims else value
  return {name: batch[name] for name in config.fields}


def by_old_path(parameters: ModelParameters, old_paths) -> dict[str, tuple[str, bool]]:
  """Old path -> (today's path, whether the old array is today's one in memory turned around)."""
  found = {}
  for old in old_paths:
    path, turned = renamed(old)
    found[old] = path, turned != (path in parameters.transposed)
  return found


@pytest.mark.parametrize("name", CASES)
def test_the_same_losses_and_gradients(name):
  stage, changes, seed = CASES[name]
  golden, config = GOLDEN[name], tiny.make_config(stage, **changes)
  parameters = ModelParameters.of(config)
  names = by_old_path(parameters, golden["fresh"])
  assert {path for path, _ in names.values()} == set(parameters.shapes)

  fresh = parameters.initialise(tiny.one_device_mesh(config), 0)
  values = {}
  for old, (path, turned) in names.items():
    value = np.asarray((fresh[0] | fresh[1])[path])
    assert np.abs(value.astype(np.float64)).sum() == pytest.approx(golden["fresh"][old], rel=1e-6), old
    shape = np.swapaxes(value, -1, -2).shape if turned else value.shape
    added = 0.2 * noise(old, shape) if value.ndim else 0
    values[path] = jnp.asarray((value + (np.swapaxes(added, -1, -2) if turned else added)).astype(value.dtype))
  trained, frozen = parameters.split(values)
  batch, key = old_batch(stage, config), None if seed is None else jax.random.key(seed)

  def objective(trained):
    loss = config.stage.loss(parameters.model(trained, frozen), batch, key)
    return loss.value, loss

  (value, loss), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(trained)
  assert float(value) == pytest.approx(golden["loss"], rel=1e-6)
  assert float(loss.weight) == golden["weight"]
  metrics = {metric: float(loss.metrics[metric]) for metric in golden["metrics"]}
  assert metrics == pytest.approx(golden["metrics"], rel=2e-6)
  assert len(gradients) == len(golden["gradients"])
  for old, (norm, along) in golden["gradients"].items():
    path, turned = names[old]
    gradient = np.asarray(gradients[path], np.float64)
    gradient = np.swapaxes(gradient, -1, -2) if turned else gradient
    assert np.sqrt((gradient**2).sum()) == pytest.approx(norm, rel=5e-6, abs=1e-6), old
    assert (gradient * noise(f"dot {old}", gradient.shape)).sum() == pytest.approx(along, rel=5e-6, abs=1e-5), old
