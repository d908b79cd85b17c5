"""A loaded run computes the same on one device and on a mesh of eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from lyrics_jax.inference.generator import Generator
from lyrics_jax.inference.loaded import LoadedModel, parse_mesh
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.sharding import MeshSettings
from refiner_export.common.settings import UserError
from refiner_export.records.reader import RecordDirectory

MESH = MeshSettings(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def questions(exported):
  """Prompts of different lengths, more than a batch holds."""
  directory = RecordDirectory(exported)
  return [(directory[0], "What is this?"), (directory[1], "How many cats are there on the bench?"),
          (directory[2], "Where?"), (directory[0], "Where is <box 0.0>?"), (directory[2], "Who? " * 6)]


@pytest.fixture(scope="module", params=["float32", "int8"])
def output(request, tmp_path_factory) -> str:
  """The run's matrices are in float32, or its language model is in int8 under adapters."""
  trained = small_run.trained_vlm if request.param == "float32" else small_run.trained_int8_vlm
  return str(trained(tmp_path_factory))


@pytest.fixture(scope="module")
def loaded(output) -> LoadedModel:
  return LoadedModel.open(output)


@pytest.fixture(scope="module")
def on_mesh(output) -> LoadedModel:
  return LoadedModel.open(output, MESH, VLMSettings)


def test_each_device_holds_its_part(loaded, on_mesh):
  split = 0
  for here, there in zip(loaded.parameters, on_mesh.parameters):
    assert here.keys() == there.keys()
    for path, whole in here.items():
      assert len(whole.sharding.device_set) == 1 and len(there[path].sharding.device_set) == 8
      part = there[path].addressable_shards[0].data
      split += part.size < whole.size
      np.testing.assert_array_equal(whole, there[path], strict=True)
  assert split > 10


def test_the_same_logits(loaded, on_mesh, questions):
  generator = Generator(loaded, 4)
  examples = [generator._examples.prompt(record, [text]) for record, text in questions[:4]]
  batch = {name: np.stack([example[name] for example in examples]) for name in loaded.config.fields}

  def logits(model, batch):
    return model.logits(model(batch))

  found = [np.asarray(each.compiled(logits)(batch)) for each in (loaded, on_mesh)]
  valid = batch["segments"] > 0
  np.testing.assert_allclose(found[1][valid], found[0][valid], atol=2e-5)


def test_the_same_answers(loaded, on_mesh, questions):
  alone = Generator(loaded, batch_size=3, max_new_tokens=12)
  together = Generator(on_mesh, batch_size=3, max_new_tokens=12)
  assert (alone.batch_size, together.batch_size) == (3, 4)  # four devices split the rows
  expected = alone.answer(questions)
  assert len(expected) == len(questions) and together.answer(questions) == expected


def test_answers_do_not_depend_on_the_batch(run, questions):
  generator = Generator(LoadedModel.open(str(run)), batch_size=3, max_new_tokens=12)
  assert generator.answer(questions) == [generator.answer([question])[0] for question in questions]
  assert generator.answer([]) == []
  assert generator._decode.compilations == 1


def test_new_parameters_do_not_compile_again(run):
  loaded = LoadedModel.open(str(run))

  def mean(model, rows):
    return model.llm.norm.scale[...].mean() + rows.sum()

  program = loaded.compiled(mean)
  rows = np.ones((2, 3), np.float32)
  before = float(program(rows))
  trained, frozen = loaded.parameters
  loaded.parameters = jax.tree.map(lambda a: a + jnp.ones((), a.dtype), trained), frozen
  assert float(program(rows)) == pytest.approx(before + 1) and program.compilations == 1


def test_rows_that_the_mesh_divides(loaded, on_mesh):
  assert [loaded.rows(count) for count in (1, 3)] == [1, 3]
  assert [on_mesh.rows(count) for count in (1, 4, 5)] == [4, 4, 8]


def test_a_model_of_another_kind(run):
  with pytest.raises(UserError, match="needs a model of AlignerSettings, the run's is VLMSettings"):
    LoadedModel.open(str(run), kind=AlignerSettings)


@pytest.mark.parametrize("text, message", [
    ("8", "--mesh=8: expected three numbers of devices"), ("1,x,1", "--mesh=1,x,1: expected three"),
    ("-1,-1,1", "at most one is -1")])
def test_wrong_meshes(text, message):
  with pytest.raises(UserError) as raised:
    parse_mesh(text)
  assert message in str(raised.value) and "\n" not in str(raised.value)


def test_meshes():
  assert parse_mesh(None) is None and parse_mesh("1,-1,2") == MeshSettings(1, -1, 2)


def test_a_mesh_of_other_devices(run):
  with pytest.raises(UserError, match="data x fsdp x tensor = 3 x 1 x 1 does not give the 8 devices here"):
    LoadedModel.open(str(run), MeshSettings(data=3))
