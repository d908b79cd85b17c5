"""Stage 2: the picture's place in the conversation, which tokens count, what the MQ-Former hears."""

import jax
import numpy as np
import pytest
import tiny

VISUAL = ("detection", "detection_mask", "masks", "masks_mask")
HEARD = ("spatial_ids", "spatial_mask", "instruction_ids", "instruction_mask")


@pytest.fixture(scope="module")
def batch(instruct):
  return tiny.make_batch(instruct.plan.config)


@pytest.fixture(scope="module")
def inside(instruct, batch):
  """Soft tokens, the language model's input and its logits."""
  @jax.jit
  def run(parameters, batch):
    model = instruct.plan.model(*instruct.plan.split(parameters))
    return model.soft_tokens(batch), model.embed(batch), model.logits(model(batch))

  return [np.asarray(value) for value in run(instruct.parameters, batch)]


def test_soft_tokens_stand_at_their_slots(instruct, batch, inside):
  soft, embeddings, _ = inside
  words = np.asarray(instruct.parameters["llm/words/embedding"])
  assert soft.shape == (8, tiny.QUERIES, 16)
  for row in range(8):
    for place, slot in enumerate(batch["slot"][row]):
      expected = soft[row, slot] if slot >= 0 else words[batch["ids"][row, place]]
      np.testing.assert_array_equal(embeddings[row, place], expected)


def test_slots_may_stand_anywhere(instruct, batch, inside):
  """In another order, elsewhere, or not at all: a record of text alone ignores its (black) picture."""
  moved = batch | {"slot": np.full_like(batch["slot"], -1)}
  moved["slot"][0, 3:7] = [3, 2, 1, 0]

  @jax.jit
  def embed(parameters, batch):
    return instruct.plan.model(*instruct.plan.split(parameters)).embed(batch)

  embeddings = np.asarray(embed(instruct.parameters, moved))
  np.testing.assert_allclose(embeddings[0, 3:7], inside[0][0, ::-1], rtol=1e-5, atol=1e-5)  # compiled apart
  words = np.asarray(instruct.parameters["llm/words/embedding"])
  np.testing.assert_array_equal(embeddings[1:], words[batch["ids"][1:]])


def test_several_pictures_are_as_many_rows(instruct, inside, batch):
  """Two pictures in a row: the soft tokens of each are those of the picture alone."""
  pairs = {}
  for name, value in batch.items():
    of_picture = "pictures" in instruct.plan.config.fields[name].dims
    pairs[name] = value.reshape(4, 2, *value.shape[2:]) if of_picture else value[:4]

  @jax.jit
  def soft_tokens(parameters, batch):
    return instruct.plan.model(*instruct.plan.split(parameters)).soft_tokens(batch)

  soft = np.asarray(soft_tokens(instruct.parameters, pairs))
  assert soft.shape == (4, 2 * tiny.QUERIES, 16)
  np.testing.assert_allclose(soft.reshape(8, tiny.QUERIES, 16), inside[0], rtol=1e-5, atol=1e-5)  # compiled apart


def test_only_the_assistants_tokens_count(instruct, batch, inside):
  logits = inside[2].astype(np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  used = batch["targets"][:, 1:]
  losses = -np.take_along_axis(log_p[:, :-1], batch["ids"][:, 1:, None], -1)[..., 0]
  loss = instruct.loss(instruct.parameters, batch)
  assert float(loss.value) == pytest.approx(losses[used].mean(), rel=1e-5)  # float32 against float64
  assert float(loss.weight) == used.sum()
  right = logits[:, :-1].argmax(-1) == batch["ids"][:, 1:]
  assert float(loss.metrics["token_accuracy"]) == pytest.approx(right[used].mean())


def test_words_after_the_last_target_do_not_matter(instruct, batch):
  changed = batch | {"ids": batch["ids"].copy()}
  for row in range(8):
    last = np.flatnonzero(batch["targets"][row])[-1]
    changed["ids"][row, last + 1:] = tiny.WORDS
  assert (changed["ids"] != batch["ids"]).any()
  assert instruct.loss(instruct.parameters, changed).value == instruct.loss(instruct.parameters, batch).value


def test_without_any_target_the_loss_is_zero(instruct, batch):
  loss = instruct.loss(instruct.parameters, batch | {"targets": np.zeros_like(batch["targets"])})
  assert loss.value == 0 and loss.weight == 0


def test_padding_changes_nothing(instruct, compiled, batch):
  longer = compiled("instruct", data__spatial_length=13, data__caption_length=11, data__llm_length=20,
                    stage__model__connector__local__detection_rows=6, stage__model__connector__local__mask_rows=7)
  padded = tiny.pad_batch(batch, longer.plan.config)
  before, after = instruct.loss(instruct.parameters, batch), longer.loss(instruct.parameters, padded)
  assert float(after.value) == pytest.approx(float(before.value), rel=1e-5)  # float32, other summation order
  assert after.weight == before.weight


def test_a_blank_refiner_adds_nothing(instruct, batch):
  """Without a valid row the features are not looked at, and the loss is finite."""
  blank = batch | {name: np.zeros_like(batch[name]) for name in VISUAL}
  noisy = blank | {"detection": batch["detection"] + 7, "masks": batch["masks"] - 7}
  loss = instruct.loss(instruct.parameters, blank).value
  assert np.isfinite(loss) and loss == instruct.loss(instruct.parameters, noisy).value
  assert loss != instruct.loss(instruct.parameters, batch).value


@pytest.mark.parametrize("aware, spatial", [
    (True, True), (False, True), (False, False), pytest.param(True, False, marks=pytest.mark.slow)])
def test_the_mq_former_hears_what_is_configured(instruct, compiled, batch, aware, spatial):
  stage = instruct if aware and spatial else compiled(
      "instruct", stage__model__connector__instruction=aware, stage__model__connector__spatial=spatial)
  config = stage.plan.config
  assert (("spatial_ids" in config.fields), ("instruction_ids" in config.fields)) == (spatial, aware)
  other = tiny.make_batch(instruct.plan.config, seed=9)
  loss = stage.loss(stage.parameters, batch).value
  for names, heard in ((HEARD[:2], spatial), (HEARD[2:], aware)):
    changed = batch | {name: other[name] for name in names}
    assert (stage.loss(stage.parameters, changed).value != loss) == heard


def test_how_it_is_computed_changes_nothing(instruct, compiled, batch):
  """Another attention kernel, the loss in chunks."""
  other = compiled("instruct", compute__attention="splash", stage__objectives__0__chunk=5)
  expected, got = instruct.loss(instruct.parameters, batch), other.loss(instruct.parameters, batch)
  assert float(got.value) == pytest.approx(float(expected.value), rel=1e-5)  # float32 sums in another order
  assert float(got.metrics["token_accuracy"]) == pytest.approx(float(expected.metrics["token_accuracy"]), rel=1e-6)
  kernels = lambda of: str(jax.make_jaxpr(of.loss)(instruct.parameters, batch)).count("pallas_call")
  assert kernels(other) > kernels(instruct) == 0
