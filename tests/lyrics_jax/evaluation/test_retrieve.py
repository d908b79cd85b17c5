"""Retrieval with a model: against one pair at a time, while training, and as a command."""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_run

from lyrics_jax import retrieve as command
from lyrics_jax.config import Config
from lyrics_jax.evaluation.retrieval import best, recalls, reranked
from lyrics_jax.evaluation.retriever import FIGURES, Retrieval, Retriever, retrieve
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.objectives.icg import ICG
from lyrics_jax.objectives.itc import ITC
from lyrics_jax.objectives.itm import ITM
from lyrics_jax.objectives.msp import MSP
from lyrics_jax.sharding import make_mesh
from lyrics_jax.stage import Stage
from lyrics_jax.train import train
from lyrics_jax.training import metrics
from lyrics_jax.training.parameters import ModelParameters
from refiner_export.common.settings import UserError
from refiner_export.records.reader import RecordDirectory

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def config(exported, tmp_path_factory) -> Config:
  """Stage 1 on the three photos, with retrieval every second step of four."""
  model = AlignerSettings(vision=small_run.vision_settings(), connector=small_run.connector_settings())
  config = Config(
      stage=Stage(model=model, objectives=(ITC(), ITM(), ICG(), MSP()),
                  train=("connector/*", "itc_*", "temperature", "itm/*", "lm_head/*")),
      output=str(tmp_path_factory.mktemp("align") / "run"), steps=4, batch_size=8, log_every=1, checkpoint_every=2,
      data=small_run.data_settings(tmp_path_factory), compute=Compute(dtype="float32", frozen_dtype="float32"),
      evaluations=(Retrieval(records=str(exported), every=2, rerank=2),))
  config.finalize()
  return config


@pytest.fixture(scope="module")
def align_run(config) -> str:
  train(config)
  return config.output


@pytest.fixture(scope="module")
def loaded(config) -> LoadedModel:
  """On all eight devices, with noise on all parameters, so that everything differs from everything."""
  parameters = ModelParameters.of(config)
  mesh = make_mesh(config.mesh)
  rng = np.random.default_rng(0)

  def noisy(value: jax.Array) -> jax.Array:
    noise = 0.3 * rng.standard_normal(value.shape) if value.ndim else 0
    return jax.device_put((np.asarray(value) + noise).astype(value.dtype), value.sharding)

  trained, frozen = jax.tree.map(noisy, parameters.initialise(mesh, 0))
  return LoadedModel(parameters, mesh, trained, frozen)


@pytest.fixture(scope="module")
def retriever(loaded) -> Retriever:
  return Retriever(loaded, 8)


@dataclasses.dataclass
class Single:
  """Of one picture and one text at a time, P pictures and T texts.

  `pictures`: [P, D]; `texts`: [2, T, D], with objects and without; `probabilities`: [2, P, T], by all queries of the
  text with objects, and by the visual queries of the text without; `picture_of`: [T].
  """
  pictures: np.ndarray
  texts: np.ndarray
  probabilities: np.ndarray
  picture_of: np.ndarray


@pytest.fixture(scope="module")
def single(loaded, retriever, exported) -> Single:
  directory = RecordDirectory(exported)
  model = loaded.model_parameters.model(*jax.device_get(loaded.parameters))

  @jax.jit
  def score(picture, text):
    without = text | {"spatial_ids": text["spatial_ids"][..., :1], "spatial_mask": text["spatial_mask"][..., :1]}
    seen = model.passes(picture)
    features, probabilities = [], []
    for shown in (text, without):
      passes = model.passes(shown)
      features.append(passes.texts[0])
      probabilities.append(jax.nn.softmax(model.match(seen.key_values, passes.text))[:, 0, 1])
    return seen.images[0, 0], features, probabilities

  pictures, picture_of, texts = [], [], []
  for number in range(len(directory)):
    pictures.append(retriever.examples.picture(directory[number]))
    for text in retriever.examples.texts(directory[number]):
      picture_of.append(number)
      texts.append(text)
  features = np.zeros((len(pictures), 256), np.float32)
  of_texts = np.zeros((2, len(texts), 256), np.float32)
  probabilities = np.zeros((2, len(pictures), len(texts)), np.float32)
  for p, picture in enumerate(pictures):
    for t, text in enumerate(texts):
      one = jax.tree.map(lambda a: a[None], (picture, text))
      features[p], of_texts[:, t], (by_objects, by_caption) = jax.device_get(score(*one))
      probabilities[:, p, t] = by_objects.mean(), by_caption[0]
  return Single(features, of_texts, probabilities, np.array(picture_of))


def test_in_batches_as_one_at_a_time(retriever, exported, single):
  directory = RecordDirectory(exported)
  texts = []
  for number in range(len(directory)):
    texts += retriever.examples.texts(directory[number])
  # More pairs than a batch, and not a multiple of it.
  wanted = np.random.default_rng(0).random((len(directory), len(texts))) < 0.6
  assert wanted.sum() > retriever.batch_size and wanted.sum() % retriever.batch_size
  np.testing.assert_allclose(retriever.picture_features(directory)[:, 0], single.pictures, atol=1e-5)
  np.testing.assert_allclose(retriever.text_features(texts), single.texts, atol=1e-5)
  found = retriever.matching(directory, texts, wanted)
  np.testing.assert_allclose(found, np.where(wanted, single.probabilities, 0), atol=1e-5)
  assert np.ptp(single.probabilities, axis=(1, 2)).min() > 1e-3
  assert np.abs(single.texts[0] - single.texts[1]).max() > 1e-2


def test_the_figures(retriever, exported, single):
  found = retrieve(retriever, RecordDirectory(exported), 2)
  for figure, features, matching in zip(FIGURES, single.texts, single.probabilities):
    similarity = single.pictures @ features.T
    again = [reranked(similarity, matching, chosen) for chosen in best(similarity, 2)]
    expected = {"itc": recalls(similarity, similarity, single.picture_of), "itm": recalls(*again, single.picture_of)}
    for way, values in expected.items():
      assert {name: found[f"{figure}{way}_{name}"] for name in values} == pytest.approx(values), (figure, way)
  assert len(found) == 24
  assert retrieve(retriever, RecordDirectory(exported), 0) == {
      name: value for name, value in found.items() if "itc" in name}
  programs = retriever._picture_features, retriever._text_features, retriever._key_values, retriever._matching
  assert [program.compilations for program in programs] == [1, 1, 1, 1]


def test_the_steps_at_which_training_measures(align_run):
  for entry in metrics.read(align_run):
    measured = {name for name in entry if name.startswith("retrieval/")}
    assert len(measured) == (24 if entry["step"] in (2, 4) else 0) and "itc" in entry
    assert all(0 <= entry[name] <= 1 for name in measured)
  assert metrics.read(align_run)[1]["retrieval/itc_i2t_r10"] == 1.0  # of three pictures


@pytest.mark.slow
def test_a_resumed_run_measures_the_same(align_run, config, tmp_path):
  """It goes on from step 2 without measuring there: that it ends the same also shows that measuring changes nothing."""
  resumed = dataclasses.replace(config, output=str(shutil.copytree(align_run, tmp_path / "run")))
  resumed.finalize()
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  train(resumed)

  def kept(output: str) -> list[dict[str, float]]:
    entries = metrics.read(output)
    for entry in entries:
      for name in [name for name in entry if "per_second" in name]:
        del entry[name]
    return entries

  assert kept(resumed.output) == kept(align_run)
  parameters = [LoadedModel.open(output).parameters for output in (align_run, resumed.output)]
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), *parameters)


def test_on_a_mesh(align_run, exported):
  arguments = align_run, str(exported), 2
  assert command.evaluate(*arguments, mesh="2,2,2") == pytest.approx(command.evaluate(*arguments))


def test_the_command(align_run, exported, tmp_path, capsys):
  output = tmp_path / "found.json"
  results = command.evaluate(align_run, str(exported), 2, str(output))
  said = capsys.readouterr().out.splitlines()
  assert said[0] == "3 pictures, the records it was trained on; recall in percent"
  assert [line[:40].rstrip() for line in said[3:]] == [
      "texts with objects, ITC", "texts with objects, ITM of the 2 best",
      "captions only, ITC", "captions only, ITM of the 2 best"]
  assert [float(cell) for cell in said[3][40:].split()] == pytest.approx(
      [100 * results[f"itc_{direction}_r{k}"] for direction in ("i2t", "t2i") for k in (1, 5, 10)], abs=0.1)
  assert json.loads(output.read_text()) == {"records": 3, "trained_on_these_records": True, "rerank": 2} | results
  assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
  last = metrics.read(align_run)[-1]
  measured = {name: value for name, value in last.items() if name.startswith("retrieval/")}
  assert measured == pytest.approx({f"retrieval/{name}": value for name, value in results.items()})


@pytest.mark.parametrize("arguments, message", [
    ({"checkpoint": "/nowhere"}, "run not found: /nowhere"),
    ({"records": "/nowhere"}, "no manifest.json in /nowhere"),
    ({"output": "/nowhere/found.json"}, "directory of --output not found: /nowhere")])
def test_mistakes(align_run, exported, arguments, message):
  with pytest.raises(UserError) as raised:
    command.evaluate(**{"checkpoint": align_run, "records": str(exported)} | arguments)
  assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_of_the_other_stage(run, exported):
  with pytest.raises(UserError, match="needs a model of AlignerSettings, the run's is VLMSettings"):
    command.evaluate(str(run), str(exported))


def test_a_vision_language_model_is_not_measured(exported, tmp_path, tmp_path_factory):
  with pytest.raises(UserError, match=r"config.evaluations\[0\] needs a model of AlignerSettings, the run's is VLMS"):
    small_run.vlm_config(tmp_path_factory, tmp_path, evaluations=(Retrieval(records=str(exported)),))


def test_records_of_another_refiner(align_run, config, export_photos, tmp_path):
  other = str(export_photos(1, grid=3))
  with pytest.raises(UserError, match="made by refiner"):
    command.evaluate(align_run, other)
  refused = dataclasses.replace(config, output=str(tmp_path), evaluations=(Retrieval(records=other, every=2),))
  refused.finalize()
  with pytest.raises(UserError, match="made by refiner"):
    train(refused)
  assert not list(tmp_path.iterdir())  # refused before anything is written


def test_measuring_between_two_lines_of_the_log(config):
  with pytest.raises(UserError, match=r"evaluations\[0\].every=2 is not a multiple of config.log_every=3"):
    dataclasses.replace(config, log_every=3).finalize()


def test_a_mistake_on_the_command_line():
  line = [sys.executable, "-m", "lyrics_jax.retrieve", "--checkpoint=/nowhere", "--records=records", "--rerank=many"]
  result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
