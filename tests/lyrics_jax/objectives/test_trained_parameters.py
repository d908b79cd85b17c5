"""Which parameters train, and that a gradient reaches every one that it should reach."""

import fnmatch

import numpy as np
import pytest
import tiny

from refiner_export.common.settings import UserError

# Exactly zero in exact arithmetic: a softmax does not change when the same is added to all its scores.
UNMOVED = "/k/bias"
ROUNDING = 1e-6  # float32 noise of such a sum, where gradients are 1e-3 and more
CONNECTOR = {("connector", "image_norm"), ("connector", "local_tokens"), ("connector", "former")}


def parts(plan, trained):
  """First two names of the paths."""
  return {tuple(path.split("/")[:2]) for path in plan.paths(trained)}


def test_align_trains_all_but_the_image_encoder(align):
  assert {first for first, *_ in parts(align.plan, False)} == {"vision"}
  heads = {("itc_image", "kernel"), ("itc_image", "bias"), ("itc_text", "kernel"), ("itc_text", "bias"),
           ("itm", "kernel"), ("itm", "bias"), ("lm_head", "dense"), ("lm_head", "norm"), ("lm_head", "bias"),
           ("temperature",)}
  assert parts(align.plan, True) == CONNECTOR | heads


@pytest.mark.parametrize("train", ["full", "lora", "frozen"])
def test_instruct_trains_what_is_configured(train):
  plan = tiny.make_plan(tiny.make_config("instruct", **tiny.TRAIN[train]))
  llm = {path for path in plan.shapes if path.startswith("llm/")}
  trained = {path for path in plan.paths(True) if path.startswith("llm/")}
  lora = {f"llm/stack/blocks/{projection}/lora_{side}" for projection in "qv" for side in "ab"}
  assert trained == {"full": llm, "lora": lora, "frozen": set()}[train]
  assert {path for path in llm if "/lora_" in path} == (lora if train == "lora" else set())
  rest = {tuple(path.split("/")[:2]) for path in plan.paths(True) if not path.startswith("llm/")}
  assert rest == CONNECTOR | {("connector", "projection")}
  assert not set(plan.paths(True)) & set(plan.paths(False))
  assert len(plan.paths(True)) + len(plan.paths(False)) == len(plan.shapes)


def test_any_part_may_be_trained_alone():
  """A projection, an encoder, adapters without their connector: a pattern says it."""
  for pattern in ("connector/projection/*", "vision/*", "llm/*/lora_a", "connector/former/queries"):
    plan = tiny.make_plan(tiny.make_config("instruct", stage__train=(pattern,)))
    assert plan.paths(True) and all(fnmatch.fnmatchcase(path, pattern) for path in plan.paths(True))


@pytest.mark.parametrize("changes, message", [
    ({"stage__train": ("conector/*",)}, r"config.stage.train: the pattern 'conector/\*' matches no parameter; "),
    ({"stage__train": ("llm/*/lora_*",), "stage__model__llm__lora": None}, r"the pattern 'llm/\*/lora_\*' matches no"),
    ({"stage__train": ("llm/stack/blocks/q/kernel",), "compute__frozen_dtype": "int8"},
     "config.stage.train names llm/stack/blocks/q/kernel, which config.compute.frozen_dtype=int8 stores in int8"),
])
def test_a_pattern_that_cannot_be_meant(changes, message):
  config = tiny.make_config("instruct", **changes)
  with pytest.raises(UserError, match=message):
    tiny.make_plan(config)


def largest(compiled, trained=None):
  """The largest gradient of each parameter; of a stack of layers, in its least moved layer."""
  gradient = compiled.gradient(trained or compiled.trained, compiled.frozen, tiny.make_batch(compiled.plan.config))
  assert gradient.keys() == set(compiled.plan.paths(True))
  assert all(np.isfinite(value).all() for value in gradient.values())
  sizes = {}
  for path, value in gradient.items():
    layers = value if "/stack/" in path else value[None]
    sizes[path] = np.abs(layers).reshape(len(layers), -1).max(-1)
  return sizes


def test_align_moves_every_trained_parameter(align):
  for path, sizes in largest(align).items():
    assert sizes.max() < ROUNDING if path.endswith(UNMOVED) else sizes.min() > 10 * ROUNDING, (path, sizes)


def test_instruct_moves_every_trained_parameter_but_the_last_text_mlp(instruct):
  """After the last layer only the queries are read: the text side of that layer has no say (as in BLIP-2)."""
  for path, sizes in largest(instruct).items():
    if "/text_mlp/" in path:
      assert sizes[-1] == 0, path
      sizes = sizes[:-1]
    assert sizes.max() < ROUNDING if path.endswith(UNMOVED) else sizes.min() > 10 * ROUNDING, (path, sizes)


def test_fresh_adapters_move_in_b_first(instruct):
  """B = 0 hides A: at the first step A has no gradient, B has."""
  zero = instruct.trained | {path: 0 * value for path, value in instruct.trained.items() if path.endswith("lora_b")}
  sizes = largest(instruct, zero)
  assert all(size.max() == 0 for path, size in sizes.items() if path.endswith("lora_a"))
  assert all(size.min() > 10 * ROUNDING for path, size in sizes.items() if path.endswith("lora_b"))


@pytest.mark.slow
def test_full_fine_tuning_moves_the_language_model(compiled):
  for path, sizes in largest(compiled("instruct", **tiny.TRAIN["full"])).items():
    if path.startswith("llm/"):
      assert sizes.min() > 10 * ROUNDING, (path, sizes)
