"""SAM-HQ with a full-size ViT-B and random weights: segment_anything_hq is compared with this project's segmenter."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from segment_anything_hq import SamPredictor, sam_model_registry
from tiny_models import randomise

from refiner_export.refiners.base import Detections
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.originals.sam_hq import OriginalSamHQ
from refiner_export.refiners.sam_hq.segmenter import SamHQ
from refiner_export.common.settings import UserError

CPU = Compute(device="cpu")
BOXES = [[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.4], [0.3, 0.3, 0.4, 0.4]], [[0, 0, 1, 1]]


@pytest.fixture(scope="module")
def sam():
  """The package's model."""
  model = sam_model_registry["vit_b"]().requires_grad_(False)
  randomise(model, seed=0)
  return model


@pytest.fixture(scope="module")
def checkpoint(sam, tmp_path_factory) -> str:
  file = tmp_path_factory.mktemp("sam_hq") / "sam_hq_vit_b.pth"
  torch.save(sam.state_dict(), file)
  return str(file)


@pytest.fixture(scope="module")
def detections():
  return [detected(boxes) for boxes in BOXES]


def detected(boxes) -> Detections:
  boxes = np.array(boxes, np.float32)
  return Detections(("thing",) * len(boxes), boxes, np.ones(len(boxes), np.float32), np.zeros((1, 256), np.float32),
                    np.zeros((1, 4), np.float32))


def settings(kind, checkpoint, **changes):
  made = kind(checkpoint, **{"store_masks": True, "batch": 1, "box_batch": 2, **changes})
  made.finalize()
  return made


@pytest.fixture(scope="module")
def original(checkpoint):
  return settings(OriginalSamHQ, checkpoint).build(CPU)


@pytest.fixture(scope="module")
def project(checkpoint):
  return settings(SamHQ, checkpoint).build(CPU)


class Run:
  """The segments that a segmenter made of the pictures, and the inputs and outputs of its decoder at each call."""

  def __init__(self, segmenter, pictures, detections):
    self.calls = []
    with segmenter.decoder.register_forward_hook(lambda module, inputs, output: self.calls.append((inputs, output))):
      self.segments = segmenter.segment(pictures, detections)


@pytest.fixture(scope="module")
def runs(original, project, pictures, detections):
  return Run(original, pictures, detections), Run(project, pictures, detections)


def test_both_networks_agree(runs):
  for (expected_inputs, expected), (inputs, found) in zip(*(run.calls for run in runs), strict=True):
    torch.testing.assert_close(inputs[0], expected_inputs[0], atol=1e-3, rtol=0)  # the encoder's output
    torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.ious, expected.ious, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=0)


def test_boxes_of_many_pictures_in_one_decode(original, project):
  draw = torch.Generator().manual_seed(1)
  embeddings, early = torch.randn(2, 256, 64, 64, generator=draw), torch.randn(2, 64, 64, 768, generator=draw)
  prompts, owners = torch.tensor(BOXES[0]) * 1024, torch.tensor([0, 1, 1])
  with torch.inference_mode():
    expected, found = (segmenter.decoder(embeddings, segmenter.decoder.fuse(embeddings, early), prompts, owners)
                       for segmenter in (original, project))
  for name, tolerance in (("tokens", 1e-4), ("ious", 1e-4), ("logits", 1e-3)):
    torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=tolerance, rtol=0)


def test_both_segmenters_agree_with_the_packages_predictor(runs, sam, pictures):
  """Compares masks that the package's predictor makes with masks that this project makes with either network."""
  segments = runs[0].segments
  for segment, ours in zip(segments, runs[1].segments, strict=True):
    np.testing.assert_allclose(ours.features, segment.features, atol=1e-4)
    np.testing.assert_allclose(ours.ious, segment.ious, atol=1e-4)
    np.testing.assert_allclose(ours.areas, segment.areas, atol=1e-3)
  predictor = SamPredictor(sam)
  (width, height), boxes = pictures[0].image.size, torch.tensor(BOXES[0])
  predictor.set_image(np.asarray(pictures[0].image))
  prompts = predictor.transform.apply_boxes_torch(boxes * torch.tensor([width, height]).repeat(2), (height, width))
  masks, ious, _ = predictor.predict_torch(None, None, boxes=prompts, multimask_output=False)
  codes = [{"size": (height, width), "counts": counts} for counts in segments[0].rles]
  stored = np.stack([coco_mask.decode(code) for code in codes]).astype(bool)
  assert 0.02 < stored.mean() < 0.98
  assert (stored != masks[:, 0].numpy()).mean() < 1e-3  # logits that differ by 1e-5 may lie on both sides of 0
  np.testing.assert_allclose(segments[0].ious, ious[:, 0], atol=1e-4)


def test_the_description_tells_the_two_apart(checkpoint):
  described, plain = (settings(kind, checkpoint).describe() for kind in (OriginalSamHQ, SamHQ))
  assert described["name"] != plain["name"] and described["package"] == "0.3"
  assert {key: described[key] for key in plain if key != "name"} == {key: plain[key] for key in plain if key != "name"}


def test_settings_that_cannot_be(checkpoint, sam, tmp_path):
  with pytest.raises(UserError, match="config.checkpoint: .* is not a file. Name the file sam_hq_vit_h.pth"):
    settings(OriginalSamHQ, str(tmp_path))
  with pytest.raises(UserError, match="compile=True: .* set compute.compile=False"):
    settings(OriginalSamHQ, checkpoint).build(Compute(device="cpu", compile=True))
  weights = sam.state_dict()
  for change, message in (
      ({"image_encoder.patch_embed.proj.bias": torch.zeros(32)}, "is no official SAM-HQ checkpoint"),
      ({"extra": torch.zeros(1)}, "holds extra"),
      ({"mask_decoder.hf_token.weight": torch.zeros(1, 2)}, r"hf_token.weight has the shape \(1, 2\)")):
    torch.save(weights | change, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"other.pth.*{message}.*Name the file sam_hq_vit_h.pth"):
      settings(OriginalSamHQ, str(tmp_path / "other.pth")).build(CPU)
