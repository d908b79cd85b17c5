"""Grounding-DINO-T at full size with random weights: the package groundingdino is compared with this project."""

import pathlib
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_models import GROUNDING_DINO_WORDS, randomise
from transformers import BertTokenizer

from refiner_export.refiners.base import Tags
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.grounding_dino.detector import GroundingDino
from refiner_export.refiners.originals.grounding_dino import OriginalGroundingDino, build_untrained
from refiner_export.common.settings import UserError

CPU = Compute(device="cpu")
TAGS = ("cat", "red car"), ("persons", "house", "tree")
SMALL = {"shortest": 192, "longest": 288, "box_threshold": 0.3, "text_threshold": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A folder with an official checkpoint and a vocabulary. Special tokens have the numbers that the model knows."""
  folder = tmp_path_factory.mktemp("grounding_dino")
  placed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
  placed |= dict(enumerate(GROUNDING_DINO_WORDS, start=2000))
  words = [placed.get(number, f"[unused{number}]") for number in range(30_522)]
  (folder / "vocab.txt").write_text("\n".join(words) + "\n")
  network = build_untrained(BertTokenizer.from_pretrained(folder)).network
  randomise(network, seed=0)
  with torch.no_grad():
    for layer in network.transformer.encoder.text_layers:  # otherwise every query is sure of every token
      layer.norm2.weight *= 0.1
    for head in (network.bbox_embed[0], network.transformer.enc_out_bbox_embed):  # so that boxes touch the border
      head.layers[-1].weight *= 4
  weights = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
  extra = {"module.label_enc.weight": torch.zeros(2001, 256),
           "module.bert.embeddings.position_ids": torch.arange(512)[None]}
  torch.save({"model": weights | extra}, folder / "groundingdino.pth")
  return folder


def settings(kind, folder, **changes):
  made = kind(**{"checkpoint": str(folder / "groundingdino.pth"), "tokenizer": str(folder), **SMALL, **changes})
  made.finalize()
  return made


@pytest.fixture(scope="module")
def original(folder):
  return settings(OriginalGroundingDino, folder).build(CPU)


@pytest.fixture(scope="module")
def project(folder):
  return settings(GroundingDino, folder).build(CPU)


@pytest.fixture(scope="module")
def inputs(project, pictures):
  """Arguments of the network for a batch: the first picture with a short caption and with a longer one."""
  pixels = np.asarray(project.prepare(pictures[0].image)) / 255.0
  normalised = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  ids, mask, _ = project.captioner.pad([project.captioner.captions(tags)[0] for tags in TAGS])
  return torch.tensor(normalised, dtype=torch.float32).permute(2, 0, 1).expand(2, -1, -1, -1), ids, mask


class Choices:
  """Records from which places of a picture the queries of one network start, and prescribes them to another network.

  A query depends on its rank among the 900. Some of so many random scores differ by less than rounding errors.
  """

  def __init__(self):
    self.taken = []

  def record(self):
    """A context in which a network chooses freely, and its choices are recorded."""
    choose = torch.topk

    def topk(scores, k, **keywords):
      chosen = choose(scores, k, **keywords)
      self.taken.append((scores, chosen.indices))
      return chosen

    return mock.patch.object(torch, "topk", topk)

  def replay(self, pictures=slice(None)):
    """A context in which a network must give the recorded scores, and gets the recorded places.

    Args:
      pictures: which pictures of the recorded batch the network sees.
    """
    taken = iter(self.taken)

    def topk(scores, k, **keywords):
      expected, indices = (tensor[pictures] for tensor in next(taken))
      torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
      return scores.gather(1, indices), indices

    return mock.patch.object(torch, "topk", topk)


@pytest.fixture(scope="module")
def package_run(original, inputs):
  """The outputs of the package's network for the batch, and its choices."""
  choices = Choices()
  with torch.inference_mode(), choices.record():
    return original.model(*inputs), choices


def test_both_networks_agree(project, inputs, package_run):
  outputs, choices = package_run
  with torch.inference_mode(), choices.replay():
    ours = project.model(*inputs)
  hidden, _, boxes = outputs
  assert hidden.shape == (2, 900, 256) and ((boxes < 1e-3) | (boxes > 1 - 1e-3)).any()
  for name, left, right in zip(("hidden", "logits", "boxes"), ours, outputs):
    finite = torch.isfinite(right)
    assert torch.equal(finite, torch.isfinite(left)), name
    torch.testing.assert_close(left[finite], right[finite], atol=1e-3, rtol=0, msg=lambda text: f"{name}: {text}")


def test_a_batch_gives_what_the_package_gives_for_each_alone(original, folder, inputs, package_run, monkeypatch):
  """The package runs with its tokenizer, and without the hooks that repeat the mask of each caption."""
  network, ((_, logits, boxes), choices) = original.model.network, package_run
  monkeypatch.setattr(network, "tokenizer", BertTokenizer.from_pretrained(folder))
  for layer in network.transformer.encoder.text_layers:
    monkeypatch.setattr(layer, "_forward_pre_hooks", {})
  for index, caption in enumerate(("cat . red car .", "persons . house . tree .")):
    with torch.inference_mode(), choices.replay(slice(index, index + 1)):
      alone = network(inputs[0][:1], captions=[caption])
    torch.testing.assert_close(alone["pred_logits"][0, :, :logits.shape[2]], logits[index], atol=1e-3, rtol=0)
    torch.testing.assert_close(alone["pred_boxes"][0], boxes[index], atol=1e-3, rtol=0)


def test_both_detectors_agree(original, project, pictures):
  tags, choices = [Tags(names, np.ones(len(names), np.float32)) for names in TAGS], Choices()
  with choices.record():
    expected = original.detect(pictures, tags)
  with choices.replay():
    found = project.detect(pictures, tags)
  for left, right in zip(found, expected, strict=True):
    assert len(right.tags) > 3
    for rows in (all_rows, all_objects):
      assert rows(left).shape == rows(right).shape
      # Rows of nearly equal score may change places.
      distances = torch.cdist(rows(left), rows(right), p=float("inf"))
      assert max(distances.amin(dim=0).max(), distances.amin(dim=1).max()) < 1e-3, rows.__name__


def all_rows(found) -> torch.Tensor:
  return torch.from_numpy(np.column_stack([found.row_features, found.row_boxes]))


def all_objects(found) -> torch.Tensor:
  names = sorted({name for tags in TAGS for name in tags})
  return torch.from_numpy(np.column_stack([[names.index(tag) for tag in found.tags], found.boxes, found.scores]))


def test_bfloat16_is_finite(folder, pictures):
  half = settings(OriginalGroundingDino, folder).build(Compute(device="cpu", precision="bfloat16"))
  (found,) = half.detect(pictures[:1], [Tags(TAGS[0], np.ones(2, np.float32))])
  assert found.row_features.dtype == np.float32
  assert np.isfinite(found.row_features).all() and np.isfinite(found.row_boxes).all()


def test_the_description_tells_the_two_apart(folder):
  described = settings(OriginalGroundingDino, folder).describe()
  plain = settings(GroundingDino, folder).describe()
  assert described["name"] != plain["name"] and described["package"] == "0.4.0"
  assert {key: described[key] for key in plain if key != "name"} == {key: plain[key] for key in plain if key != "name"}


def test_settings_that_cannot_be(folder, tmp_path):
  for changes, message in (
      ({"checkpoint": str(folder)}, "config.checkpoint: .* is not a file. Name the file groundingdino_swint_ogc.pth"),
      ({"tokenizer": None}, "config.tokenizer is not set. Name a directory"),
      ({"tokenizer": str(tmp_path)}, "config.tokenizer: .*vocab.txt is missing. Name a directory")):
    with pytest.raises(UserError, match=message):
      settings(OriginalGroundingDino, folder, **changes)
  with pytest.raises(UserError, match="compile=True: .* set compute.compile=False"):
    settings(OriginalGroundingDino, folder).build(Compute(device="cpu", compile=True))
  torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
  with pytest.raises(UserError, match="other.pth lacks .* Name the file groundingdino_swint_ogc.pth"):
    settings(OriginalGroundingDino, folder, checkpoint=str(tmp_path / "other.pth")).build(CPU)
