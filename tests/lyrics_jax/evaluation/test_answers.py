"""Answers that are scored while a model trains."""

import pytest
import small_run

from lyrics_jax.evaluation.questions import Answers
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.train import train
from lyrics_jax.training import metrics
from refiner_export.common.settings import UserError
from refiner_export.records.reader import RecordDirectory


def test_figures_in_the_metrics(exported, tmp_path, tmp_path_factory):
  config = small_run.vlm_config(
      tmp_path_factory, tmp_path / "run", steps=2,
      evaluations=(Answers(records=str(exported), every=1, most=6, max_new_tokens=4),))
  train(config)
  for entry in metrics.read(config.output):
    assert {name for name in entry if name.startswith("answers/")} == {
        "answers/exact", "answers/mean_iou", "answers/found"}
  loaded = LoadedModel.open(config.output, kind=VLMSettings)
  fingerprint = RecordDirectory(exported).manifest.fingerprint
  measured = config.evaluations[0].build(config, fingerprint)(loaded)
  last = metrics.read(config.output)[-1]
  assert {f"answers/{name}": value for name, value in measured.items()} == pytest.approx(
      {name: value for name, value in last.items() if name.startswith("answers/")})


def test_mistakes(exported, tmp_path, tmp_path_factory):
  with pytest.raises(UserError, match=r"config.evaluations\[0\].records is empty"):
    small_run.vlm_config(tmp_path_factory, tmp_path, evaluations=(Answers(),))
  with pytest.raises(UserError, match=r"config.evaluations\[0\].most=0"):
    small_run.vlm_config(tmp_path_factory, tmp_path, evaluations=(Answers(records=str(exported), most=0),))
