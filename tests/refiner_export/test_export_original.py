"""The authors' packages as a refiner, as far as this can be tested without the packages.

The tests cover errors about missing packages and wrong settings, the way from a manifest back to the refiner, and RAM++
with a stand-in for its package.
"""

import dataclasses
import json
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_refiner import one_thread, tiny_ram_plus_size, tiny_refiner  # noqa: F401

from refiner_export.export.config import refiner_from_manifest
from refiner_export.records.manifest import Manifest
from refiner_export.records.schema import SCHEMA_VERSION, fingerprint
from refiner_export.refiners.base import UprightPicture
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.neural import NeuralRefiner
from refiner_export.refiners.originals.grounding_dino import OriginalGroundingDino
from refiner_export.refiners.originals.ram_plus import OriginalRamPlus
from refiner_export.refiners.originals.sam_hq import OriginalSamHQ
from refiner_export.refiners.ram_plus.model import RamPlusModel
from refiner_export.refiners.ram_plus.tagger import load
from refiner_export.common.settings import UserError, from_dict

ROOT = pathlib.Path(__file__).parents[2]
CPU = Compute(device="cpu")
MODULES = {"tagger": "ram.models.ram_plus", "detector": "groundingdino.models", "segmenter": "segment_anything_hq"}
APART = "in an environment of its own, as constraints-original.txt says"
REMEDIES = {"tagger": "Install it from the recognize-anything project's repository, beside transformers before 4.48; ",
            "detector": f"Install groundingdino-py==0.4.0 {APART}",
            "segmenter": f"Install segment-anything-hq==0.3 {APART}"}


@pytest.fixture(scope="module")
def project(tmp_path_factory, one_thread, tiny_ram_plus_size):  # noqa: F811
  """The refiner of this project's networks. The packages get the same files."""
  return tiny_refiner(tmp_path_factory.mktemp("refiner"))


@pytest.fixture(scope="module")
def refiner(project, tmp_path_factory):
  """The refiner of the authors' packages. Its settings are not checked yet."""
  words = tmp_path_factory.mktemp("words")
  (words / "vocab.txt").write_text("[PAD]\n")
  return NeuralRefiner(
      OriginalRamPlus(**dataclasses.asdict(project.tagger)),
      # The checkpoint of the detector may be any file here.
      OriginalGroundingDino(project.segmenter.checkpoint, tokenizer=str(words), box_threshold=0.4),
      OriginalSamHQ(project.segmenter.checkpoint, feature="mask_pooled"), CPU)


@pytest.fixture
def stand_ins(monkeypatch):
  """Puts empty modules in place of the packages, so that settings pass their check."""
  for module in MODULES.values():
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))


# --- packages that are missing ---

@pytest.mark.parametrize("role", MODULES)
def test_a_package_that_is_not_installed(refiner, stand_ins, monkeypatch, role):
  package, _, rest = MODULES[role].partition(".")
  monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
  if rest:
    monkeypatch.delitem(sys.modules, MODULES[role])
  with pytest.raises(UserError) as error:
    dataclasses.replace(refiner).finalize("config.refiner")
  message = str(error.value)
  assert message.startswith(f"config.refiner.{role} needs the package {MODULES[role]}, which cannot be imported here (")
  assert REMEDIES[role] in message and "\n" not in message


def test_a_package_that_is_broken(refiner, stand_ins, monkeypatch, tmp_path):
  """A torchvision for another torch raises a RuntimeError of many lines, not an ImportError."""
  (tmp_path / "segment_anything_hq.py").write_text("raise RuntimeError('operator torchvision::nms\\ndoes not exist')")
  monkeypatch.delitem(sys.modules, "segment_anything_hq")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match=r"^config.segmenter needs .* \(operator torchvision::nms does not exist\). Inst"):
    dataclasses.replace(refiner.segmenter).finalize("config.segmenter")


def test_the_environment_has_the_versions_that_are_asked_for():
  lines = (ROOT / "constraints-original.txt").read_text().splitlines()
  for role in ("detector", "segmenter"):
    assert REMEDIES[role].split()[1] in lines


# --- settings that cannot be ---

@pytest.mark.parametrize("role", MODULES)
def test_no_package_is_compiled(refiner, role):
  with pytest.raises(UserError, match="^compute.compile=True: .* set compute.compile=False$"):
    getattr(refiner, role).build(Compute(device="cpu", compile=True))


@pytest.mark.parametrize("role, field, value, message", [
    ("detector", "checkpoint", str(ROOT), r"detector.checkpoint: .* is not a file. Name the file groundingdino_swint"),
    ("detector", "tokenizer", None, r"detector.tokenizer is not set. Name a directory with "),
    ("detector", "tokenizer", str(ROOT), r"detector.tokenizer: .*vocab.txt is missing. Name a directory with "),
    ("segmenter", "checkpoint", str(ROOT), r"segmenter.checkpoint: .* is not a file. Name the file sam_hq_vit_h.pth "),
    ("tagger", "checkpoint", "nowhere.pth", r"tagger.checkpoint not found: nowhere.pth. Name the file ram_plus_swin_")])
def test_files_that_a_package_cannot_read(refiner, stand_ins, role, field, value, message):
  with pytest.raises(UserError, match=f"^config.{message}"):
    dataclasses.replace(getattr(refiner, role), **{field: value}).finalize(f"config.{role}")


# --- found again ---

def test_the_refiner_of_a_manifest(refiner, project, stand_ins):
  described = refiner.describe()
  assert all(described[role]["name"] == f"original_{project.describe()[role]['name']}" for role in MODULES)
  manifest = Manifest(SCHEMA_VERSION, fingerprint(described), "bfloat16", 900, described, "photos", "train", shards=(),
                      records=0, conversations=0, pictures=0, skipped=0)
  files = {"tagger.checkpoint": refiner.tagger.checkpoint, "tagger.tag_list": refiner.tagger.tag_list,
           "tagger.thresholds": refiner.tagger.thresholds, "detector.checkpoint": refiner.detector.checkpoint,
           "detector.tokenizer": refiner.detector.tokenizer, "segmenter.checkpoint": refiner.segmenter.checkpoint}
  found = refiner_from_manifest(manifest, files)
  assert found.describe() == described and type(found.detector) is OriginalGroundingDino
  assert (found.detector.box_threshold, found.segmenter.feature) == (0.4, "mask_pooled")


def test_settings_are_read_back_with_their_classes(refiner, stand_ins):
  found = from_dict(NeuralRefiner, json.loads(refiner.to_json()), "config.refiner")
  kinds = [type(getattr(found, role)) for role in MODULES]
  assert found == refiner and kinds == [OriginalRamPlus, OriginalGroundingDino, OriginalSamHQ]


def test_a_manifest_without_its_package(refiner, monkeypatch):
  monkeypatch.setitem(sys.modules, "ram.models.ram_plus", None)
  manifest = Manifest(SCHEMA_VERSION, "", "bfloat16", 900, refiner.describe(), "photos", "train", shards=(), records=0,
                      conversations=0, pictures=0, skipped=0)
  files = dict.fromkeys(["tagger.checkpoint", "tagger.tag_list", "tagger.thresholds", "detector.checkpoint",
                         "segmenter.checkpoint"], "nowhere")
  with pytest.raises(UserError, match="^refiner.tagger needs the package ram.models.ram_plus, .*recognize-anything"):
    refiner_from_manifest(manifest, files)


# --- RAM++ ---

def make_ram_package(config):
  """A module like `ram.models.ram_plus`, whose network asks for a tokenizer, has a computed table and returns words."""
  package = types.ModuleType("ram.models.ram_plus")

  def init_tokenizer():
    raise OSError("bert-base-uncased cannot be fetched")

  class RAM_plus(RamPlusModel):  # so that its weights have the same names
    def __init__(self, image_size, vit):
      super().__init__(config)
      assert (image_size, vit) == (config.swin.image_size, "swin_l")
      self.words = len(package.init_tokenizer())
      self.visual_encoder.register_buffer("relative_position_index", torch.arange(4))

    def generate_tag(self, images):
      features = self.encode(images)
      queries = torch.relu(self.wordvec_proj(self.reweight(features[:, 0])))
      # The factor of 2 makes the results differ from those of this project's network.
      logits = self.fc(2 * self.tagging_head(queries, features)).squeeze(-1)
      return [" | ".join("a" for _ in row) for row in logits > 0], []

  package.init_tokenizer, package.RAM_plus = init_tokenizer, RAM_plus
  return package


@pytest.fixture
def pictures():
  draw = np.random.default_rng(0)
  return [UprightPicture(Image.fromarray(draw.integers(0, 255, (40, 60, 3), np.uint8))) for _ in range(3)]


def test_scores_are_those_of_the_packages_network(project, refiner, pictures, monkeypatch, tmp_path):
  model = load(project.tagger.checkpoint, "swin_l").eval()
  package = make_ram_package(model.config)
  monkeypatch.setitem(sys.modules, "ram.models.ram_plus", package)
  (tmp_path / "none.txt").write_text("0\n" * model.config.tags)  # so that every picture gets every tag
  settings = dataclasses.replace(refiner.tagger, thresholds=str(tmp_path / "none.txt"))
  settings.finalize("config.tagger")
  tagger = settings.build(CPU)
  assert isinstance(tagger.model.network, package.RAM_plus) and tagger.model.network.words == 30_524
  with pytest.raises(OSError):
    package.init_tokenizer()  # the package is unchanged
  pixels = np.stack([tagger.prepare(picture.image) for picture in pictures]) / 255.0
  images = torch.tensor((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(0, 3, 1, 2)
  with torch.inference_mode():
    features = model.encode(images)
    queries = torch.relu(model.wordvec_proj(model.reweight(features[:, 0])))
    expected = model.fc(2 * model.tagging_head(queries, features))[..., 0].sigmoid().numpy()
  for found, scores in zip(tagger.tag(pictures), expected, strict=True):
    order = np.argsort(-scores)
    assert found.names == tuple(tagger.names[index] for index in order)
    np.testing.assert_allclose(found.scores, scores[order], rtol=1e-4)


def test_a_package_for_another_checkpoint(project, refiner, monkeypatch):
  config = load(project.tagger.checkpoint, "swin_l").config
  monkeypatch.setitem(sys.modules, "ram.models.ram_plus", make_ram_package(dataclasses.replace(config, tags=4)))
  with pytest.raises(UserError, match=r"ram_plus.pth: label_embed has the shape \(21, 12\), expected \(12, 12\). "
                                      "Name the file that the installed package ram was made for"):
    refiner.tagger.build(CPU)
