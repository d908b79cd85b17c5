"""Retrieval with a model: against one pair at a time, while training, and as a command."""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lyrics_jax import retrieve as command
from lyrics_jax.config import AlignConfig, Config
from lyrics_jax.evaluation.retrieval import best, recalls, reranked
from lyrics_jax.evaluation.retriever import FIGURES, Retriever, retrieve
from lyrics_jax.models import masks
from lyrics_jax.models.mq_former import spatial_and_caption
from lyrics_jax.stages.align import image_features, text_features
from lyrics_jax.training import metrics
from lyrics_jax.training.checkpoint import Checkpoints, saved_config
from lyrics_jax.training.loop import train
from lyrics_jax.training.sharding import make_mesh
from refiner_export.records.reader import RecordDirectory
from refiner_export.common.settings import UserError

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def config(run, exported, tmp_path_factory) -> Config:
  """Stage 1 on the three photos, with retrieval every second step of four."""
  instruct = saved_config(str(run))
  config = Config(stage="align", output=str(tmp_path_factory.mktemp("align") / "run"), steps=4, batch_size=8, log_every=1,
                  checkpoint_every=2, model=instruct.model, data=instruct.data,
                  align=AlignConfig(retrieval_records=str(exported), retrieval_every=2, retrieval_rerank=2))
  config.finalize()
  return config


@pytest.fixture(scope="module")
def align_run(config) -> str:
  train(config)
  return config.output


@pytest.fixture(scope="module")
def model(config):
  """(plan, parameters): with noise, so that everything differs from everything."""
  plan = tiny.make_plan(config)
  return plan, tiny.make_parameters(plan, spread=0.3)


@pytest.fixture(scope="module")
def retriever(model, config) -> Retriever:
  return Retriever(model[0], make_mesh(config.mesh), 8)


@pytest.fixture(scope="module")
def single(model, retriever, exported):
  """Of one picture and one text at a time: (picture [P, D], texts [2, T, D], probabilities [2, P, T], picture_of)."""
  plan, parameters = model
  directory, examples = RecordDirectory(exported), retriever.examples
  pictures = [examples.picture(directory[k]) for k in range(len(directory))]
  texts = [(k, text) for k in range(len(directory)) for text in examples.texts(directory[k])]

  @jax.jit
  def score(picture, text):
    model = plan.model(*parameters)
    picture, text = jax.tree.map(lambda a: a[None], (picture, text))
    caption = text["caption_ids"], text["caption_mask"]
    sources = model.perception.look(picture)
    outcome = [image_features(model, model.perception.mq_former.query_pass(sources)[0], "mean")[:, 0]]
    for length in (None, 1):  # the whole spatial representation, and [BOS] alone
      joined = spatial_and_caption((text["spatial_ids"][:, :length], text["spatial_mask"][:, :length]), caption, True)
      outcome.append(text_features(model, joined))
      queries, _ = model.perception.mq_former.joint_pass(sources, joined, masks.ITM)
      outcome.append(jnp.stack([jax.nn.softmax(model.itm(pooled)[0])[1] for pooled in model.perception.mq_former.pool(queries)]))
    return outcome

  scored = [[jax.device_get(score(picture, text)) for _, text in texts] for picture in pictures]
  collect = lambda n: np.array([[pair[n] for pair in row] for row in scored])
  probabilities = np.stack([collect(2).mean(-1), collect(4)[..., 0]])
  return collect(0)[:, 0, 0], np.stack([collect(1)[0, :, 0], collect(3)[0, :, 0]]), probabilities, np.array([k for k, _ in texts])


def test_in_batches_as_one_at_a_time(model, retriever, exported, single):
  directory, parameters = RecordDirectory(exported), model[1]
  texts = sum((retriever.examples.texts(directory[k]) for k in range(len(directory))), [])
  wanted = np.random.default_rng(0).random((len(directory), len(texts))) < 0.6  # more pairs than a batch, and not a multiple
  assert wanted.sum() > retriever.batch_size and wanted.sum() % retriever.batch_size
  with jax.set_mesh(retriever.mesh):
    np.testing.assert_allclose(retriever.picture_features(parameters, directory)[:, 0], single[0], atol=1e-5)
    np.testing.assert_allclose(retriever.text_features(parameters, texts), single[1], atol=1e-5)
    found = retriever.matching(parameters, directory, texts, wanted)
  np.testing.assert_allclose(found, np.where(wanted, single[2], 0), atol=1e-5)
  assert np.ptp(single[2], axis=(1, 2)).min() > 1e-3 and np.abs(single[1][0] - single[1][1]).max() > 1e-2


def test_the_figures(model, retriever, exported, single):
  pictures, texts, probabilities, picture_of = single
  found = retrieve(retriever, model[1], RecordDirectory(exported), 2)
  for figure, features, matching in zip(FIGURES, texts, probabilities):
    similarity = pictures @ features.T
    expected = {"itc": recalls(similarity, similarity, picture_of),
                "itm": recalls(*(reranked(similarity, matching, chosen) for chosen in best(similarity, 2)), picture_of)}
    for way, values in expected.items():
      assert {name: found[f"{figure}{way}_{name}"] for name in values} == pytest.approx(values), (figure, way)
  assert len(found) == 24
  assert retrieve(retriever, model[1], RecordDirectory(exported), 0) == {
      name: value for name, value in found.items() if "itc" in name}
  assert all(program._cache_size() == 1 for program in (retriever._picture_features, retriever._text_features,
                                                        retriever._look, retriever._matching))


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
  kept = lambda output: [{name: value for name, value in entry.items() if "per_second" not in name}
                         for entry in metrics.read(output)]
  assert kept(resumed.output) == kept(align_run)
  parameters = [Checkpoints(output).restore_parameters() for output in (align_run, resumed.output)]
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), *parameters)


def test_the_command(align_run, exported, tmp_path, capsys):
  output = tmp_path / "found.json"
  results = command.evaluate(align_run, str(exported), 2, str(output))
  said = capsys.readouterr().out.splitlines()
  assert said[0] == "3 pictures, the records it was trained on; recall in percent"
  assert [line[:40].rstrip() for line in said[3:]] == [
      "texts with objects, ITC", "texts with objects, ITM of the 2 best", "captions only, ITC", "captions only, ITM of the 2 best"]
  assert [float(cell) for cell in said[3][40:].split()] == pytest.approx(
      [100 * results[f"itc_{direction}_r{k}"] for direction in ("i2t", "t2i") for k in (1, 5, 10)], abs=0.1)
  assert json.loads(output.read_text()) == {"records": 3, "trained_on_these_records": True, "rerank": 2} | results
  assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
  last = metrics.read(align_run)[-1]
  assert results == pytest.approx({name.removeprefix("retrieval/"): last[name] for name in last if name.startswith("retrieval/")})


@pytest.mark.parametrize("arguments, message", [
    ({"checkpoint": ""}, "--checkpoint is required"),
    ({"checkpoint": "/nowhere"}, "run not found: /nowhere"),
    ({"records": ""}, "--records is required"),
    ({"records": "/nowhere"}, "no manifest.json in /nowhere"),
    ({"rerank": -1}, "--rerank=-1: name how many"),
    ({"output": "/nowhere/found.json"}, "directory of --output not found: /nowhere")])
def test_mistakes(align_run, exported, arguments, message):
  with pytest.raises(UserError) as raised:
    command.evaluate(**{"checkpoint": align_run, "records": str(exported)} | arguments)
  assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_of_the_other_stage(run, exported):
  with pytest.raises(UserError, match="is a run of stage instruct, this needs one of stage align"):
    command.evaluate(str(run), str(exported))


def test_records_of_another_refiner(align_run, config, export_photos, tmp_path):
  other = str(export_photos(1, grid=3))
  with pytest.raises(UserError, match="made by refiner"):
    command.evaluate(align_run, other)
  refused = dataclasses.replace(config, output=str(tmp_path), align=dataclasses.replace(config.align, retrieval_records=other))
  refused.finalize()
  with pytest.raises(UserError, match="made by refiner"):
    train(refused)
  assert not list(tmp_path.iterdir())  # refused before anything is written


def test_measuring_between_two_lines_of_the_log(config):
  with pytest.raises(UserError, match="retrieval_every=2 is not a multiple of config.log_every=3"):
    dataclasses.replace(config, log_every=3).finalize()


def test_a_mistake_on_the_command_line():
  line = [sys.executable, "-m", "lyrics_jax.retrieve", "--checkpoint=/nowhere", "--records=records", "--rerank=many"]
  result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
