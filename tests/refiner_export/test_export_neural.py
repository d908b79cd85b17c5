"""The neural refiner as a configuration: its description, what it loads, and how a manifest leads back to it."""

import dataclasses
import json
import pathlib
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_refiner import one_thread, tiny_ram_plus_size, tiny_refiner  # noqa: F401

from refiner_export.common.images import to_jpeg
from refiner_export.common.settings import UserError
from refiner_export.export.config import ExportConfig, refiner_from_manifest
from refiner_export.export.pipeline import refine_photo
from refiner_export.records.manifest import Manifest
from refiner_export.records.schema import SCHEMA_VERSION, fingerprint
from refiner_export.refiners.classical.refiner import ClassicalRefiner
from refiner_export.refiners.compute import Compute
from refiner_export.sources.photos import Photos

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def refiner(tmp_path_factory, one_thread, tiny_ram_plus_size):  # noqa: F811
  return tiny_refiner(tmp_path_factory.mktemp("refiner"))


@pytest.fixture(scope="module")
def photo():
  """A photo in which the tiny networks find something."""
  noise = np.random.default_rng(5).integers(0, 255, (6, 6, 3), np.uint8)
  return to_jpeg(Image.fromarray(noise).resize((90, 50), Image.Resampling.BICUBIC))


def changed(refiner, **changes):
  """The refiner with other settings. The names are dotted fields with `__` for the dot."""
  for name, value in changes.items():
    part, _, field = name.partition("__")
    refiner = dataclasses.replace(refiner, **{part: dataclasses.replace(getattr(refiner, part), **{field: value})})
  return refiner


def manifest_of(refiner) -> Manifest:
  """A manifest as it is read from a directory."""
  described = json.loads(json.dumps(refiner.describe()))
  return Manifest(SCHEMA_VERSION, fingerprint(described), "bfloat16", 30, described, "photos", "train", shards=(),
                  records=0, conversations=0, pictures=0, skipped=0)


def files_of(refiner) -> dict[str, str]:
  return {"tagger.checkpoint": refiner.tagger.checkpoint, "tagger.tag_list": refiner.tagger.tag_list,
          "tagger.thresholds": refiner.tagger.thresholds, "detector.checkpoint": refiner.detector.checkpoint,
          "segmenter.checkpoint": refiner.segmenter.checkpoint}


# --- what describes it ---

def test_the_description_is_of_what_decides(refiner):
  described = refiner.describe()
  assert described["name"] == "neural" and described["precision"] == "float32"
  names = [described[part]["name"] for part in ("tagger", "detector", "segmenter")]
  assert names == ["ram_plus", "grounding_dino", "sam_hq"]
  assert json.loads(json.dumps(described)) == described
  for same in ({"tagger__batch": 7}, {"detector__batch": 7}, {"segmenter__batch": 7, "segmenter__box_batch": 7},
               {"compute__device": "auto", "compute__compile": True}):
    assert changed(refiner, **same).describe() == described
  for other in ({"compute__precision": "bfloat16"}, {"detector__box_threshold": 0.4}, {"detector__shortest": 72},
                {"segmenter__feature": "mask_pooled"}, {"tagger__thresholds": refiner.tagger.tag_list}):
    assert fingerprint(changed(refiner, **other).describe()) != fingerprint(described)


def test_files_are_read_once(refiner, monkeypatch):
  fresh = dataclasses.replace(refiner)
  described = fresh.describe()
  monkeypatch.setattr("refiner_export.refiners.ram_plus.tagger.sha256", None)
  assert fresh.describe() == described
  fresh.describe()["name"] = "other"
  assert fresh.describe() == described


# --- what it loads ---

def test_the_three_networks(refiner, photo):
  models = refiner.build()
  assert models.detector.rows == 30
  (picture,) = refine_photo(photo, models).pictures
  assert 0 < len(picture.tags) == len(picture.mask_features) and picture.detection_features.shape == (30, 256)
  (half,) = refine_photo(photo, changed(refiner, compute__precision="bfloat16").build()).pictures
  assert 0 < np.abs(half.detection_features - picture.detection_features).mean() < 0.2


def test_a_file_that_does_not_fit(refiner, tmp_path):
  wrong = tmp_path / "wrong.pth"
  shutil.copy(refiner.segmenter.checkpoint, wrong)
  for part, origin in (("tagger", "ram_plus_swin_large_14m.pth of the recognize-anything project"),
                       ("segmenter", "sam_hq_vit_h.pth")):
    if part == "segmenter":
      shutil.copy(refiner.tagger.checkpoint, wrong)
    mistaken = changed(refiner, **{f"{part}__checkpoint": str(wrong)})
    mistaken.finalize("config.refiner")
    with pytest.raises(UserError, match=f"^{wrong}.* Name the file {origin}") as error:
      mistaken.build()
    assert "\n" not in str(error.value)


# --- the configuration ---

def test_an_export_takes_either_refiner(refiner):
  for some in (refiner, ClassicalRefiner()):
    ExportConfig("out", Photos(), refiner=some).finalize()
  with pytest.raises(UserError, match="^config.refiner: expected RefinerSettings, got Photos"):
    ExportConfig("out", Photos(), refiner=Photos()).finalize()
  with pytest.raises(UserError, match="^config.refiner.detector: expected GroundingDino, got "):
    ExportConfig("out", Photos(), refiner=dataclasses.replace(refiner, detector=refiner.tagger)).finalize()


@pytest.mark.parametrize("field, origin", [
    ("tagger.checkpoint", "ram_plus_swin_large_14m.pth of the recognize-anything project's release"),
    ("tagger.tag_list", "ram_tag_list.txt of the recognize-anything project"),
    ("tagger.thresholds", "ram_tag_list_threshold.txt of the recognize-anything project"),
    ("detector.checkpoint", "groundingdino_swint_ogc.pth of the GroundingDINO project's release"),
    ("detector.tokenizer", "tokenizer.json or vocab.txt of bert-base-uncased"),
    ("segmenter.checkpoint", "sam_hq_vit_h.pth")])
def test_the_published_configuration_says_which_file_it_misses(refiner, field, origin):
  config = runpy.run_path(str(ROOT / "configs/export_neural.py"))["get_config"]()
  assert (config.refiner.tagger.backbone, config.refiner.segmenter.feature) == ("swin_l", "hq_token")
  assert (config.refiner.detector.box_threshold, config.refiner.detector.text_threshold,
          config.refiner.detector.max_iou) == (0.25, 0.2, 0.6)
  for name, path in {**files_of(refiner), "detector.tokenizer": refiner.detector.checkpoint}.items():
    part, _, last = name.partition(".")
    setattr(getattr(config.refiner, part), last, "nowhere" if name == field else path)
  with pytest.raises(UserError, match=f"^config.refiner.{field}(:| not found:) .*nowhere.*{origin}") as error:
    config.finalize()
  assert "\n" not in str(error.value)


def test_the_command_line_names_the_files():
  result = subprocess.run(
      [sys.executable, "-m", "refiner_export", "--config", "configs/export_neural.py",
       "--config.refiner.tagger.checkpoint=nowhere.pth"], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 2 and result.stderr.splitlines()[-1] == (
      "error: config.refiner.tagger.checkpoint not found: nowhere.pth. Name the file ram_plus_swin_large_14m.pth of "
      "the recognize-anything project's release")


def test_the_quickstart_needs_no_torch():
  code = ("import sys, configs.export_quickstart, refiner_export.export.pipeline, refiner_export.export.run\n"
          "configs.export_quickstart.get_config().finalize()\n"
          "print([name for name in ('torch', 'transformers') if name in sys.modules])")
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert result.stdout.strip() == "[]", result.stderr


# --- found again ---

def test_the_refiner_of_a_manifest(refiner, photo):
  made = changed(refiner, detector__box_threshold=0.45, compute__precision="bfloat16", segmenter__feature="mask_pooled")
  found = refiner_from_manifest(manifest_of(made), files_of(made))
  assert found.describe() == made.describe() and found.detector.box_threshold == 0.45
  assert found.compute == Compute(precision="bfloat16")
  beside = {**files_of(made), "detector.tokenizer": made.detector.checkpoint}
  assert refiner_from_manifest(manifest_of(made), beside).describe() == made.describe()
  assert refiner_from_manifest(manifest_of(ClassicalRefiner(grid=5))) == ClassicalRefiner(grid=5)


def test_files_of_a_manifest_that_are_not_named(refiner):
  manifest, files = manifest_of(refiner), files_of(refiner)
  with pytest.raises(UserError, match="^records were made by the neural refiner: name its files tagger.checkpoint, "
                                      "tagger.tag_list, tagger.thresholds, detector.checkpoint, segmenter.checkpoint$"):
    refiner_from_manifest(manifest)
  with pytest.raises(UserError, match=r"^tagger.list: the neural refiner has no such file \(known: tagger.check"):
    refiner_from_manifest(manifest, {**files, "tagger.list": "x"})
  with pytest.raises(UserError, match="^refiner.segmenter.checkpoint: not found: nowhere.pth. "):
    refiner_from_manifest(manifest, {**files, "segmenter.checkpoint": "nowhere.pth"})


def test_files_of_a_manifest_that_are_others(refiner, tmp_path):
  words = tmp_path / "thresholds.txt"
  words.write_text(pathlib.Path(refiner.tagger.thresholds).read_text().replace("0.5", "0.6"))
  with pytest.raises(UserError, match=r"^records were made by refiner neural version 1 \(.*\), this program has neural "
                                      "version 1 with another tagger.thresholds: export again$"):
    refiner_from_manifest(manifest_of(refiner), {**files_of(refiner), "tagger.thresholds": str(words)})


def test_a_part_that_this_program_does_not_have(refiner):
  manifest = manifest_of(refiner)
  manifest.refiner["detector"]["name"] = "yolo"
  with pytest.raises(UserError, match="^records were made with yolo, which this program does not have: export again$"):
    refiner_from_manifest(manifest, files_of(refiner))
