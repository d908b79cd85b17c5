"""SAM-HQ: the decoder is compared with the published algorithm; then the segmenter and its checkpoints are tested."""

import math
import pickle

import numpy as np
import pytest
import tiny_sam_hq
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_sam_hq import GRID, SIDE, WIDTH
from transformers import SamHQProcessor, SamImageProcessorPil

from refiner_export.refiners.base import Detections, UprightPicture
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.sam_hq.segmenter import SamHQ, load
from refiner_export.refiners.sam_hq.decoder import MaskDecoder, mean_under, to_picture
from refiner_export.refiners.sam_hq.names import NAMES, translate
from refiner_export.common.settings import UserError

CPU = Compute(device="cpu")
SIZES = (90, 61), (50, 100), (64, 64)  # width and height of the pictures; 128 * 61 / 90 is 86.8
BOXES = ([[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.4], [0.3, 0.3, 0.4, 0.4]], [[0, 0, 1, 1]], [])


def test_denormal_numbers_are_zero():
  """A CPU takes ten times as long over denormal numbers, and padded pictures give many of them."""
  assert (torch.full((9,), 1e-30) * 1e-10 == 0).all()


@pytest.fixture(scope="module")
def weights():
  return tiny_sam_hq.weights()


@pytest.fixture(scope="module")
def directory(weights, tmp_path_factory):
  return tiny_sam_hq.write_directory(tmp_path_factory.mktemp("sam_hq") / "hf", weights)


@pytest.fixture(scope="module")
def model(directory):
  return load(directory).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def segmenter(directory):
  return SamHQ(directory, store_masks=True).build(CPU)


@pytest.fixture(scope="module")
def pictures():
  draw = np.random.default_rng(0)
  noise = [Image.fromarray(draw.integers(0, 255, (6, 6, 3), np.uint8)) for _ in SIZES]
  return [UprightPicture(image.resize(size, Image.Resampling.BICUBIC)) for image, size in zip(noise, SIZES)]


@pytest.fixture(scope="module")
def detections():
  return [detected(boxes) for boxes in BOXES]


@pytest.fixture(scope="module")
def segments(segmenter, pictures, detections):
  return segmenter.segment(pictures, detections)


def detected(boxes) -> Detections:
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  return Detections(("thing",) * len(boxes), boxes, np.ones(len(boxes), np.float32), np.zeros((1, 256), np.float32),
                    np.zeros((1, 4), np.float32))


def assert_same(left, right, tolerance):
  for name in ("features", "ious", "areas"):
    np.testing.assert_allclose(getattr(left, name), getattr(right, name), atol=tolerance, err_msg=name)


# --- the published algorithm, one box at a time ---

class Published:
  """SAM (Kirillov et al. 2023, appendix A) with the HQ token and the HQ features (Ke et al. 2023, section 3)."""

  def __init__(self, weights):
    self.weights = weights

  def linear(self, name, x):
    return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

  def norm(self, name, x, axis=-1, eps=1e-5):
    centred = x - x.mean(axis, keepdim=True)
    scaled = centred / (centred.square().mean(axis, keepdim=True) + eps).sqrt()
    shape = [-1] + [1] * (x.dim() - 1) if axis == 0 else [-1]
    return scaled * self.weights[f"{name}.weight"].view(shape) + self.weights[f"{name}.bias"].view(shape)

  def convolve(self, name, x, transposed=True):
    weight, bias = self.weights[f"mask_decoder.{name}.weight"], self.weights[f"mask_decoder.{name}.bias"]
    if transposed:
      return F.conv_transpose2d(x[None], weight, bias, stride=2)[0]
    return F.conv2d(x[None], weight, bias, padding=1)[0]

  def mlp(self, name, x):
    for layer in ("proj_in", "layers.0"):
      x = self.linear(f"mask_decoder.{name}.{layer}", x).relu()
    return self.linear(f"mask_decoder.{name}.proj_out", x)

  def attend(self, name, queries, keys, values, heads=8):
    split = lambda part, x: self.linear(f"{name}.{part}_proj", x).unflatten(-1, (heads, -1)).transpose(0, 1)
    queries, keys, values = split("q", queries), split("k", keys), split("v", values)
    chances = (queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[-1])).softmax(-1)
    return self.linear(f"{name}.out_proj", (chances @ values).transpose(0, 1).flatten(1))

  def encode_position(self, points):
    angles = 2 * math.pi * (2 * points - 1) @ self.weights["shared_image_embedding.positional_embedding"]
    return torch.cat([angles.sin(), angles.cos()], -1)

  def transform(self, prompts, image, positions):
    """The two-way transformer updates tokens, (8, 256), and the image, (hw, 256)."""
    tokens = prompts
    for index in range(2):
      layer = f"mask_decoder.transformer.layers.{index}"
      norm = lambda number, x: self.norm(f"{layer}.layer_norm{number}", x)
      attend = lambda name, *inputs: self.attend(f"{layer}.{name}", *inputs)
      if index == 0:
        tokens = norm(1, attend("self_attn", tokens, tokens, tokens))
      else:
        tokens = norm(1, tokens + attend("self_attn", tokens + prompts, tokens + prompts, tokens))
      tokens = norm(2, tokens + attend("cross_attn_token_to_image", tokens + prompts, image + positions, image))
      tokens = norm(3, tokens + self.linear(f"{layer}.mlp.lin2", self.linear(f"{layer}.mlp.lin1", tokens).relu()))
      image = norm(4, image + attend("cross_attn_image_to_token", image + positions, tokens + prompts, tokens))
    name = "mask_decoder.transformer.final_attn_token_to_image"
    tokens = tokens + self.attend(name, tokens + prompts, image + positions, image)
    return self.norm("mask_decoder.transformer.layer_norm_final_attn", tokens), image

  def decode(self, embedding, early, box):
    """(256, h, w), (h, w, D) and (4,) -> the HQ token, the logits and the IoU of the mask."""
    weight = lambda name: self.weights[f"{name}.weight"]
    corners = self.encode_position((box.view(2, 2) + 0.5) / SIDE)
    corners = corners + torch.cat([weight("prompt_encoder.point_embed.2"), weight("prompt_encoder.point_embed.3")])
    learned = [weight(f"mask_decoder.{name}") for name in ("iou_token", "mask_tokens", "hq_token")]
    at = (torch.arange(GRID) + 0.5) / GRID
    y, x = torch.meshgrid(at, at, indexing="ij")
    positions = self.encode_position(torch.stack([x, y], -1)).flatten(0, 1)
    image = (embedding + weight("prompt_encoder.no_mask_embed")[0][:, None, None]).flatten(1).T
    tokens, image = self.transform(torch.cat([*learned, corners]), image, positions)

    norm = lambda name, x: self.norm(f"mask_decoder.{name}", x, axis=0, eps=1e-6)
    image = image.T.reshape(256, GRID, GRID)
    image = F.gelu(norm("upscale_layer_norm", self.convolve("upscale_conv1", image)))
    image = F.gelu(self.convolve("upscale_conv2", image))
    fine = F.gelu(norm("mask_norm", self.convolve("mask_conv1", image, transposed=False)))
    fine = self.convolve("mask_conv2", fine, transposed=False)
    for name, features in (("encoder", embedding), ("compress_vit", early.permute(2, 0, 1))):
      features = F.gelu(norm(f"{name}_norm", self.convolve(f"{name}_conv1", features)))
      fine = fine + self.convolve(f"{name}_conv2", features)
    coarse_mask = (self.mlp("output_hypernetworks_mlps.0", tokens[1])[:, None, None] * image).sum(0)
    hq_mask = (self.mlp("hq_mask_mlp", tokens[5])[:, None, None] * fine).sum(0)
    return tokens[5], coarse_mask + hq_mask, self.mlp("iou_prediction_head", tokens[0])[0]


def test_decode_is_the_published_one(model, weights):
  draw = torch.Generator().manual_seed(1)
  embeddings, early = torch.randn(2, 256, GRID, GRID, generator=draw), torch.randn(2, GRID, GRID, WIDTH, generator=draw)
  boxes = torch.tensor([[10., 20., 70., 90.], [0., 0., 128., 128.], [50.5, 3.25, 60., 30.], [90., 5., 120., 20.]])
  owners = torch.tensor([0, 1, 0, 1])
  decoder = MaskDecoder(model)
  decoded = decoder(embeddings, decoder.fuse(embeddings, early), boxes, owners)
  published = Published(weights)
  for index, (box, owner) in enumerate(zip(boxes, owners)):
    for ours, theirs in zip(decoded, published.decode(embeddings[owner], early[owner], box)):
      torch.testing.assert_close(ours[index], theirs, atol=1e-5, rtol=1e-5)


# --- the segmenter ---

def test_from_picture_to_token_as_in_transformers(model, pictures, detections, segments):
  """The processor and the forward pass of transformers give the right tokens and IoU. Their masks are wrong."""
  images = SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
  processor, seen = SamHQProcessor(image_processor=images), []
  hook = model.mask_decoder.transformer.register_forward_hook(lambda module, _, output: seen.append(output[0]))
  for picture, found, segment in zip(pictures, detections, segments):
    if len(found.boxes):
      boxes = found.boxes * np.tile(picture.image.size, 2)
      inputs = processor(picture.image, input_boxes=[boxes.tolist()], return_tensors="pt")
      output = model(
          pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False)
      np.testing.assert_allclose(segment.features, seen.pop()[0, :, 5], atol=1e-5)
      np.testing.assert_allclose(segment.ious, output.iou_scores[0, :, 0], atol=1e-5)
  hook.remove()


def test_masks_have_the_pictures_size(weights, segmenter, pictures, detections):
  """The masks are compared with the published decode, resized to the picture by transformers."""
  published, images, seen = Published(weights), SamImageProcessorPil(), []
  hook = segmenter.encoder.register_forward_hook(lambda module, _, output: seen.append(output))
  segments = segmenter.segment(pictures, detections)
  hook.remove()
  encoded = seen[0].last_hidden_state, seen[0].intermediate_embeddings[0]
  extents = (128, 87), (64, 128)
  for size, extent, found, segment, embedding, early in zip(SIZES, extents, detections, segments, *encoded):
    boxes = torch.from_numpy(found.boxes) * torch.tensor(extent).repeat(2)
    logits = torch.stack([published.decode(embedding, early, box)[1] for box in boxes])
    expected = images.post_process_masks(logits[None, :, None], [size[::-1]], [extent[::-1]],
                                         pad_size={"height": SIDE, "width": SIDE})[0][:, 0].numpy()
    codes = [{"size": size[::-1], "counts": counts} for counts in segment.rles]
    masks = np.stack([coco_mask.decode(code) for code in codes]).astype(bool)
    assert masks.shape == (len(boxes), *size[::-1]) and 0.2 < masks.mean() < 0.8
    assert (masks != expected).mean() < 1e-3  # logits that differ by 1e-5 may lie on both sides of 0
    np.testing.assert_allclose(segment.areas, masks.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("feature, batch, box_batch", [("hq_token", 1, 64), ("hq_token", 3, 2), ("mask_pooled", 3, 1)])
def test_together_or_one_at_a_time(directory, pictures, detections, feature, batch, box_batch):
  together = SamHQ(directory, feature).build(CPU).segment(pictures, detections)
  apart = SamHQ(directory, feature, batch=batch, box_batch=box_batch).build(CPU)
  for picture, found, segment in zip(pictures, detections, together):
    (alone,) = apart.segment([picture], [found])
    assert_same(segment, alone, 2e-4)
    for index, box in enumerate(found.boxes):
      (single,) = apart.segment([picture], [detected(box)])
      np.testing.assert_allclose(segment.features[index:index + 1], single.features, atol=2e-4)
  for segment, same in zip(together, apart.segment(pictures, detections)):
    assert_same(segment, same, 2e-4)


def test_objects_stay_in_order(segmenter, pictures, segments):
  order = [2, 0, 1]
  (turned,) = segmenter.segment(pictures[:1], [detected(np.array(BOXES[0])[order])])
  for name in ("features", "ious", "areas"):
    values = getattr(segments[0], name)
    np.testing.assert_allclose(getattr(turned, name), values[order], atol=2e-4)
    assert min(np.abs(values[i] - values[j]).max() for i in range(3) for j in range(i)) > 1e-3
  assert turned.rles == tuple(segments[0].rles[index] for index in order)


def test_one_encode_per_picture_and_none_without_boxes(segmenter, pictures, detections, segments):
  encoded = []
  hook = segmenter.encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
  segmenter.segment(pictures, detections)
  (nothing,) = segmenter.segment(pictures[2:], detections[2:])
  hook.remove()
  assert sum(encoded) == 2
  for empty in (nothing, segments[2]):
    assert empty.features.shape == (0, 256) and empty.ious.shape == empty.areas.shape == (0,) and empty.rles == ()
  assert segmenter.segment([], []) == []


def test_what_is_kept(segments, directory, pictures, detections):
  for segment in segments:
    for value in (segment.features, segment.ious, segment.areas):
      assert value.dtype == np.float32 and np.isfinite(value).all()
  plain = SamHQ(directory).build(CPU).segment(pictures, detections)
  assert [segment.rles for segment in plain] == [(), (), ()] and len(segments[0].rles) == 3
  np.testing.assert_array_equal(plain[0].areas, segments[0].areas)


def test_bfloat16_is_close(directory, pictures, detections, segments):
  rough = SamHQ(directory).build(Compute(device="cpu", precision="bfloat16")).segment(pictures, detections)
  for segment, near in zip(segments[:2], rough):
    assert near.features.dtype == np.float32 and not np.array_equal(near.features, segment.features)
    assert_same(segment, near, 0.05)


def test_padding_is_zero_after_normalisation(segmenter, pictures):
  """Padding is zero whatever the pixels there were, because it was zero in training."""
  seen = []
  hook = segmenter.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
  segmenter.segment(pictures[:1], [detected(BOXES[0])])
  hook.remove()
  (pixels,) = seen
  assert pixels.shape == (1, 3, SIDE, SIDE) and not pixels[:, :, 87:].any() and pixels[:, :, :87].any(1).all()


def test_prepare_can_be_sent_to_a_worker(segmenter, pictures):
  sent = pickle.dumps(segmenter.prepare)
  assert len(sent) < 1000
  prepared = pickle.loads(sent)(pictures[0].image)
  assert prepared.dtype == np.uint8 and prepared.shape == (SIDE, SIDE, 3)
  assert segmenter.prepare(Image.new("RGB", (1000, 1), "white")).any()  # a picture of one row keeps this row


def test_mean_under_the_mask():
  embedding = torch.arange(2.)[:, None, None] + torch.arange(16.).reshape(4, 4)  # 2 channels
  logits = torch.full((3, 16, 16), -1.)
  logits[0, :4, :8] = 1        # cells 0 and 1
  logits[1, 4:6, :4] = 1       # half of cell 4, and all of cell 8
  logits[1, 8:, :4] = 1        # row 3 of the cells is padding
  whole = mean_under(embedding, logits, 64, extent=(64, 48))
  np.testing.assert_allclose(whole, [[0.5, 1.5], [(0.5 * 4 + 8) / 1.5, (0.5 * 4 + 8) / 1.5 + 1], [0, 0]], atol=1e-6)


def test_mask_is_cut_before_it_is_resized():
  logits = torch.full((1, 32, 32), -1.)
  logits[:, 16:] = 1
  mask = to_picture(logits, side=128, extent=(128, 96), size=(64, 48))
  assert mask.shape == (1, 48, 64) and not mask[:, :31].any() and mask[:, 33:].all()


# --- checkpoints ---

def test_official_checkpoint_is_the_same_model(tmp_path, weights, directory, pictures, detections, segments):
  file = tiny_sam_hq.write_official(tmp_path / "sam_hq_vit_x.pth", weights)
  renamed = load(file).state_dict()
  for name, tensor in load(directory).state_dict().items():
    assert torch.equal(renamed[name], tensor), name
  for name, tensor in weights.items():
    assert torch.equal(renamed[name], tensor), name
  for segment, same in zip(segments, SamHQ(file).build(CPU).segment(pictures, detections)):
    assert_same(segment, same, 1e-6)


def test_the_table_has_no_idle_row(weights):
  names = list(tiny_sam_hq.official(weights))
  assert {translate(name) for name in names} == set(weights)
  for official in NAMES:
    assert any(name.startswith(official.split("*")[0]) for name in names), official


def test_half_precision_weights_are_computed_in_float32(tmp_path, weights):
  half = {name: tensor.half() for name, tensor in weights.items()}
  model = load(tiny_sam_hq.write_directory(tmp_path / "half", half))
  assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("change, complaint", [
    (lambda w: w.pop("mask_decoder.hq_token.weight"), "lacks mask_decoder.hq_token.weight"),
    (lambda w: w.update(extra=torch.zeros(1)), "extra"),
    (lambda w: w.update({"vision_encoder.neck.conv1.weight": torch.zeros(256, 48, 1, 1)}),
     r"vision_encoder.neck.conv1.weight .*\(256, 48, 1, 1\).*\(256, 32, 1, 1\)"),
    (lambda w: w.pop("vision_encoder.pos_embed"), "no SAM-HQ checkpoint with a ViT"),
    (lambda w: w.clear() or w.update(weight=torch.zeros(1)), "no SAM-HQ checkpoint with a ViT"),
], ids=["plain SAM", "unknown", "another size", "another encoder", "another model"])
@pytest.mark.parametrize("form", ["directory", "official"])
def test_wrong_checkpoints(tmp_path, weights, change, complaint, form):
  changed = dict(weights)
  change(changed)
  write = getattr(tiny_sam_hq, f"write_{form}")
  with pytest.raises(UserError, match=f"wrong.*{complaint}.*sam_hq_vit_h.pth.*sam-hq-vit-huge") as error:
    SamHQ(write(tmp_path / "wrong.pth", changed)).build(CPU)
  assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path, directory):
  with pytest.raises(UserError, match="config.checkpoint: not found: .*none.pth. Name the file sam_hq_vit_h.pth"):
    SamHQ(str(tmp_path / "none.pth")).finalize()
  with pytest.raises(UserError, match="config.checkpoint: .*model.safetensors"):
    SamHQ(str(tmp_path)).finalize()
  (tmp_path / "broken.pth").write_bytes(b"no weights")
  with pytest.raises(UserError, match="broken.pth"):
    SamHQ(str(tmp_path / "broken.pth")).build(CPU)
  SamHQ(directory).finalize()


@pytest.mark.parametrize("field, value", [("batch", 0), ("box_batch", 0), ("feature", "both")])
def test_wrong_settings(directory, field, value):
  with pytest.raises(UserError, match=f"config.{field}: expected"):
    SamHQ(directory, **{field: value}).finalize()


def test_masks_need_pycocotools(directory, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match="config.store_masks needs pycocotools"):
    SamHQ(directory, store_masks=True).finalize()
  SamHQ(directory).finalize()


def test_description_is_of_what_decides(tmp_path, weights, directory):
  settings = SamHQ(directory)
  copy = tiny_sam_hq.write_directory(tmp_path / "copy", weights)
  assert settings.describe() == SamHQ(copy, batch=1, box_batch=2).describe()
  token = "mask_decoder.hq_token.weight"
  other = tiny_sam_hq.write_directory(tmp_path / "other", weights | {token: -weights[token]})
  for changed in (SamHQ(directory, feature="mask_pooled"), SamHQ(directory, store_masks=True), SamHQ(other)):
    assert changed.describe() != settings.describe()
