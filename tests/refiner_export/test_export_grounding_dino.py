"""Grounding-DINO: the model is compared with that of transformers; then the detector and checkpoints are tested."""

import dataclasses
import json
import pickle
import re
import shutil
import types

import numpy as np
import pytest
import torch
from official_grounding_dino import official_weights, save_official
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import TINY_QUERIES, tiny_grounding_dino, tiny_tokenizer
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoDecoder

from refiner_export.refiners.base import UprightPicture, Tags
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.grounding_dino.detector import GroundingDino, GroundingDinoDetector
from refiner_export.refiners.grounding_dino.image import DetectorImage
from refiner_export.refiners.grounding_dino.model import load_official, load_pretrained
from refiner_export.refiners.grounding_dino.names import from_official
from refiner_export.common.settings import UserError

CPU = Compute(device="cpu")
SIZES = (80, 60), (60, 80), (80, 60), (50, 90), (300, 4)  # width and height of the pictures; the last is a strip
TAGS = ("cat", "red car"), ("dog",), ("persons", "house", "tree"), (), ("St. Bernard",)
MANY = ("red car", "blue car", "cat", "dog", "house", "tree", "persons", "st bernard", "car")  # more than 16 tokens


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """For models this small, threads that wait for each other take longer than the models."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tiny_grounding_dino(tmp_path_factory.mktemp("grounding_dino"))


@pytest.fixture(scope="module")
def pictures():
  draw = np.random.default_rng(0)
  noise = [Image.fromarray(draw.integers(0, 255, (6, 6, 3), np.uint8)) for _ in SIZES]
  return [UprightPicture(image.resize(size, Image.Resampling.BICUBIC)) for image, size in zip(noise, SIZES)]


def settings(checkpoint, **changes) -> GroundingDino:
  small = {"box_threshold": 0.3, "text_threshold": 0.3, "shortest": 64, "longest": 128, "batch": 2}
  made = GroundingDino(str(checkpoint), **{**small, **changes})
  made.finalize()
  return made


@pytest.fixture(scope="module")
def detector(directory):
  return settings(directory).build(CPU)


def tagged(*names) -> Tags:
  return Tags(names, np.ones(len(names), np.float32))


def detect(detector, pictures, names):
  return detector.detect(pictures, [tagged(*some) for some in names])


def model_inputs(detector, picture, tags):
  """The arguments of the model for one picture. The normalisation is written out here."""
  pixels = np.asarray(detector.prepare(picture.image)) / 255.0
  normalised = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  ids, mask, _ = detector.captioner.pad(detector.captioner.captions(tags)[:1])
  return torch.tensor(normalised, dtype=torch.float32).permute(2, 0, 1)[None], ids, mask


def hand_written_logit(x, eps=None):
  """The `inverse_sigmoid` of the original code in NumPy. Its eps is 1e-3."""
  x = x.numpy()
  return torch.from_numpy(np.log(np.maximum(x, 1e-3) / np.maximum(1 - x, 1e-3)))


# The model.

def test_it_is_transformers_model_but_for_the_eps(directory, detector, pictures, monkeypatch):
  pixels, ids, mask = model_inputs(detector, pictures[0], TAGS[0])
  reference = GroundingDinoForObjectDetection.from_pretrained(directory).eval()
  with torch.inference_mode():
    hidden, logits, boxes = detector.model(pixels, ids, mask)
    plain = reference(pixels, ids, attention_mask=mask)
    monkeypatch.setattr(torch.special, "logit", hand_written_logit)
    patched = reference(pixels, ids, attention_mask=mask)
  assert (plain.init_reference_points < 1e-3).any() or (plain.init_reference_points > 1 - 1e-3).any()
  torch.testing.assert_close(hidden, patched.last_hidden_state, atol=1e-5, rtol=0)
  torch.testing.assert_close(boxes, patched.pred_boxes, atol=1e-6, rtol=0)
  torch.testing.assert_close(logits, patched.logits[..., :ids.shape[1]], atol=1e-4, rtol=0)
  assert (hidden - plain.last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize("border", [False, True])
def test_a_reference_is_moved_from_where_the_original_code_sees_it(detector, border, monkeypatch):
  decoder, generator = detector.model.model.decoder, torch.Generator().manual_seed(0)
  draw = lambda *shape: torch.randn(1, *shape, generator=generator)
  references = torch.full((1, 3, 4), 0.3)
  if border:
    references[0, 1] = torch.tensor([0.0, 1.0, 1e-4, 1 - 1e-4])
  levels = torch.tensor([[8, 8], [4, 4], [2, 2], [1, 1]])
  arguments = dict(
      inputs_embeds=draw(3, 256), vision_encoder_hidden_states=draw(85, 256),
      vision_encoder_attention_mask=torch.ones(1, 85, dtype=torch.bool), text_encoder_hidden_states=draw(5, 256),
      text_encoder_attention_mask=torch.zeros(1, 5, dtype=torch.bool), reference_points=references,
      spatial_shapes=levels, spatial_shapes_list=levels.tolist(), level_start_index=torch.tensor([0, 64, 80, 84]),
      valid_ratios=torch.ones(1, 4, 2), return_dict=True)
  seen = []
  hook = decoder.layers[0].register_forward_hook(lambda _, __, output: seen.append(output[0]))
  with torch.inference_mode():
    ours = decoder(**arguments)
    hook.remove()
    monkeypatch.setattr(decoder.config, "num_queries", 3)  # the loop of transformers builds a mask of this size
    theirs = GroundingDinoDecoder.forward(decoder, **arguments)
    moved = 1 / (1 + np.exp(-(decoder.bbox_embed[0](seen[0]) + hand_written_logit(references)).numpy()))
  second = ours.intermediate_reference_points[:, 1]  # the first entry is the input
  np.testing.assert_allclose(second.numpy(), moved, atol=1e-6)
  difference = (second - theirs.intermediate_reference_points[:, 0]).abs().amax(dim=(0, 2))
  assert difference[[0, 2]].max() < 1e-6 and (difference[1] > 0.0005) == border
  if not border:
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=0)


# The picture.

@pytest.mark.parametrize("size", [(80, 60), (60, 80), (64, 64), (333, 100), (91, 640)])
def test_the_picture_is_that_of_transformers_processor(size):
  pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
  processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}, do_pad=False)
  expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
  prepared = DetectorImage(64, 128, TINY_QUERIES)(Image.fromarray(pixels))
  assert prepared.dtype == np.uint8
  normalised = (prepared / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(normalised.transpose(2, 0, 1), expected, atol=1e-5)


def test_sizes():
  size = DetectorImage(800, 1333, 900).size
  assert size(480, 640) == (800, 1066) and size(640, 480) == (1066, 800) and size(1000, 3000) == (444, 1333)
  assert size(1, 3000) == (40, 1333)  # 32 pixels would have 167 * 4 + 84 * 2 + 42 + 21 positions, one too few
  assert DetectorImage(800, 1333, 899).size(3000, 1) == (1333, 32)


# The detector.

def test_batches_give_what_one_at_a_time_gives(detector, pictures):
  together = detect(detector, pictures, TAGS)
  for picture, names, found in zip(pictures, TAGS, together, strict=True):
    (alone,) = detect(detector, [picture], [names])
    assert found.tags == alone.tags
    for name in ("boxes", "scores", "row_features", "row_boxes"):
      assert getattr(found, name).dtype == np.float32
      np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=2e-4)
  assert len(together[0].tags) > 3 and set(together[2].tags) <= set(TAGS[2])
  assert detect(detector, [], []) == []


def test_rows_are_the_models_queries_best_first(detector, pictures):
  (found,) = detect(detector, pictures[:1], TAGS[:1])
  with torch.inference_mode():
    hidden, logits, boxes = detector.model(*model_inputs(detector, pictures[0], TAGS[0]))
  order = np.argsort(-logits[0].amax(dim=1).numpy())
  assert found.row_features.shape == (detector.rows, 256) and detector.rows == TINY_QUERIES
  np.testing.assert_allclose(found.row_features, hidden[0].numpy()[order], atol=1e-4)
  np.testing.assert_allclose(found.row_boxes, boxes[0].numpy()[order], atol=1e-5)


def test_objects_are_boxes_in_the_picture_best_first(detector, pictures):
  for found in detect(detector, pictures, TAGS):
    assert len(found.tags) == len(found.boxes) == len(found.scores)
    assert (found.boxes >= 0).all() and (found.boxes <= 1).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all() and (np.diff(found.scores) <= 0).all()


def test_a_picture_without_tags_has_rows_and_no_objects(detector, pictures):
  none, unusable, named = detect(detector, pictures[:1] * 3, [(), ("?",), ("object",)])
  for found in (none, unusable):
    assert found.tags == () and found.boxes.shape == (0, 4) and found.scores.shape == (0,)
    np.testing.assert_allclose(found.row_features, named.row_features, atol=2e-4)


def test_more_tags_than_a_caption_holds(detector, pictures):
  captions = detector.captioner.captions(MANY)
  assert len(captions) > 1
  (together,) = detect(detector, pictures[:1], [MANY])
  assert any(set(caption.tags) & set(together.tags) for caption in captions[1:])
  parts = detect(detector, pictures[:1] * len(captions), [caption.tags for caption in captions])
  np.testing.assert_allclose(together.row_features, parts[0].row_features, atol=2e-4)
  # Every tag is in one caption only, so suppression drops the same objects from one caption as from all together.
  found = sorted((score, tag, *box) for part in parts for score, tag, box in zip(part.scores, part.tags, part.boxes))
  assert sorted(together.tags) == sorted(tag for _, tag, *_ in found)
  np.testing.assert_allclose(together.scores, [score for score, *_ in found[::-1]], atol=2e-4)


def test_the_same_tag_twice_is_one_class(detector, pictures):
  once, twice = detect(detector, pictures[:1] * 2, [MANY[:1], MANY[:1] * 8])
  assert len(detector.captioner.captions(MANY[:1] * 8)) > 1
  assert set(twice.tags) == set(MANY[:1]) and len(twice.tags) < 2 * len(once.tags)


class PresetModel(torch.nn.Module):
  """Returns scores and boxes that a test has written down."""

  def __init__(self, scores, boxes):
    super().__init__()
    self.logits, self.boxes = torch.logit(torch.tensor([scores])), torch.tensor([boxes])
    self.config = types.SimpleNamespace(num_queries=len(scores), max_text_len=256)

  def forward(self, pixel_values, input_ids, attention_mask):
    return torch.arange(self.boxes.shape[1]).float()[None, :, None].expand(-1, -1, 256), self.logits, self.boxes


def preset(directory, rows, **changes):
  """Detections of "red car" and "dog". A row is a box and its scores for the tokens [CLS] red car . dog . [SEP]."""
  model = PresetModel([scores for _, scores in rows], [box for box, _ in rows])
  detector = GroundingDinoDetector(model, tiny_tokenizer(), settings(directory, **changes), CPU)
  return detect(detector, [UprightPicture(Image.new("RGB", (64, 64)))], [("red car", "dog")])[0]


LEFT, RIGHT = [0.25, 0.5, 0.25, 0.5], [0.75, 0.5, 0.25, 0.5]  # cxcywh


def test_thresholds(directory):
  rows = [(LEFT, [.01, .30, .10, .01, .20, .01, .01]),    # red car
          (RIGHT, [.01, .10, .26, .01, .60, .01, .01]),   # dog, not "car dog"
          (LEFT, [.01, .24, .24, .01, .24, .01, .01]),    # no token exceeds the box threshold
          (RIGHT, [.01, .19, .01, .90, .18, .01, .01]),   # the full stop exceeds it, but no tag the text threshold
          (RIGHT, [.01, .01, .22, .30, .21, .01, .01])]   # both do: the score is the tag's
  found = preset(directory, rows, box_threshold=0.25, text_threshold=0.2)
  assert found.tags == ("dog", "red car", "red car")
  np.testing.assert_allclose(found.scores, [.6, .3, .22], rtol=1e-5)
  np.testing.assert_allclose(found.boxes, [[.625, .25, .875, .75], [.125, .25, .375, .75], [.625, .25, .875, .75]])
  np.testing.assert_array_equal(found.row_features[:, 0], [3, 1, 0, 4, 2])  # by the highest score of any token
  np.testing.assert_allclose(found.row_boxes[:3], [RIGHT, RIGHT, LEFT])
  assert preset(directory, rows, box_threshold=0.61, text_threshold=0).tags == ("red car",)
  assert preset(directory, rows, box_threshold=0, text_threshold=0.5).tags == ("dog",)


def test_boxes_are_clipped_suppressed_within_a_tag_and_never_empty(directory):
  car, dog = [.01, .9, .01, .01, .01, .01, .01], [.01, .01, .01, .01, .8, .01, .01]
  near = [0.27, 0.5, 0.25, 0.5]  # overlaps LEFT by 0.85
  rows = [(near, [.01, .5, .01, .01, .01, .01, .01]), (LEFT, car), (near, dog), ([0, 0, 0.5, 0.5], car),
          ([0.5, 0.5, 0, 0.5], car), ([1, 0.5, 1e-9, 1], dog)]
  found = preset(directory, rows)
  assert found.tags == ("red car", "red car", "dog")
  np.testing.assert_allclose(found.boxes, [[.125, .25, .375, .75], [0, 0, .25, .25], [.145, .25, .395, .75]], atol=1e-6)
  assert len(preset(directory, rows, max_iou=0.9).tags) == 4


def test_bfloat16_is_finite_and_near(directory, detector, pictures):
  half = settings(directory).build(Compute(device="cpu", precision="bfloat16"))
  for found, exact in zip(detect(half, pictures, TAGS), detect(detector, pictures, TAGS)):
    assert found.row_features.dtype == found.row_boxes.dtype == found.scores.dtype == np.float32
    assert np.isfinite(found.row_features).all() and np.isfinite(found.row_boxes).all()
    assert np.corrcoef(np.sort(found.row_boxes, axis=0).ravel(), np.sort(exact.row_boxes, axis=0).ravel())[0, 1] > 0.9


@pytest.mark.slow
def test_compiled(directory, detector, pictures):
  compiled = settings(directory).build(Compute(device="cpu", compile=True))
  (found,), (expected,) = (detect(some, pictures[:1], TAGS[:1]) for some in (compiled, detector))
  np.testing.assert_allclose(found.row_features, expected.row_features, atol=2e-4)
  assert found.tags == expected.tags


# Settings and checkpoints.

def test_the_description_names_what_decides(directory, tmp_path):
  described = settings(directory).describe()
  copy = shutil.copytree(directory, tmp_path / "copy")
  assert settings(copy, batch=1).describe() == described and json.loads(json.dumps(described)) == described
  for name in ("box_threshold", "text_threshold", "max_iou", "shortest", "longest"):
    other = settings(directory, **{name: described[name] * 1.01 if described[name] < 1 else described[name] + 1})
    assert other.describe() != described
  for file in ("model.safetensors", "config.json", "tokenizer.json"):
    changed = shutil.copytree(directory, tmp_path / file)
    (changed / file).write_bytes((changed / file).read_bytes() + b" ")
    assert settings(changed).describe() != described


def test_preparing_can_be_sent_to_another_process(detector, pictures):
  prepare = pickle.loads(pickle.dumps(detector.prepare))
  prepared = [prepare(picture.image) for picture in pictures]
  ahead = detector.detect_prepared(prepared, [tagged(*names) for names in TAGS])
  for one, other in zip(ahead, detect(detector, pictures, TAGS)):
    np.testing.assert_array_equal(one.row_features, other.row_features)


def test_an_official_file_is_the_same_model(directory, detector, pictures, tmp_path):
  file = save_official(official_weights(directory, decoder_layers=3), tmp_path / "groundingdino.pth")
  model = load_official(file, detector.model.config)
  tokenizer = tiny_tokenizer()
  official = GroundingDinoDetector(model, tokenizer, settings(directory), CPU)
  for found, expected in zip(detect(official, pictures, TAGS), detect(detector, pictures, TAGS), strict=True):
    for field in dataclasses.fields(found):
      np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_every_official_name_has_its_place_at_the_published_depth(tmp_path):
  """The state_dict of the official module has 938 names. The released file has two more."""
  thin = GroundingDinoConfig(
      backbone_config=SwinConfig(embed_dim=8, num_heads=[1, 1, 2, 2], out_indices=[2, 3, 4]).to_dict(),
      text_config=BertConfig(vocab_size=1060, hidden_size=24, intermediate_size=32).to_dict(),
      encoder_ffn_dim=32, decoder_ffn_dim=32)
  GroundingDinoForObjectDetection(thin).save_pretrained(tmp_path)
  expected = load_file(tmp_path / "model.safetensors")
  official = official_weights(tmp_path, decoder_layers=6)
  found = from_official(official, tmp_path)
  assert len(official) == 940
  # Files of transformers hold a shared head once and no computed table. They also hold a norm that nothing reads.
  extra = {name for name in found if name.endswith("position_index") or re.match(r"bbox_embed\.[1-5]", name)}
  assert found.keys() - extra == {name for name in expected if "swin.layernorm" not in name}
  for name in found.keys() - extra:
    torch.testing.assert_close(found[name], expected[name], atol=0, rtol=0)


def test_files_of_earlier_versions_of_transformers(directory, detector, tmp_path):
  """Such files have tables that are computed now, and lack a norm that nothing reads. Some are in half precision."""
  copy = shutil.copytree(directory, tmp_path / "copy")
  weights = {name: tensor.bfloat16() for name, tensor in load_file(copy / "model.safetensors").items()
             if "swin.layernorm" not in name}
  table = next(name for name in weights if name.endswith("relative_position_bias_table"))
  weights[table.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
  save_file(weights, copy / "model.safetensors", {"format": "pt"})
  model = load_pretrained(copy)
  assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
  torch.testing.assert_close(model.model.level_embed, detector.model.model.level_embed, atol=0.02, rtol=0.01)


def test_settings_that_cannot_be(directory, tmp_path):
  for changes, message in (
      ({"box_threshold": 1.5}, "config.box_threshold: expected 0 to 1, got 1.5"),
      ({"max_iou": -0.1}, "config.max_iou: expected 0 to 1"),
      ({"shortest": 200}, "config: expected 32 <= shortest <= longest pixels, got 200 and 128"),
      ({"batch": 0}, "config.batch: expected at least 1"),
      ({"tokenizer": str(tmp_path)}, "config.tokenizer: .*tokenizer.json is missing. Name a directory with")):
    with pytest.raises(UserError, match=message):
      settings(directory, **changes)
  with pytest.raises(UserError, match="config.checkpoint: not found: nowhere.pth. Name the file groundingdino_"):
    settings("nowhere.pth")
  for file in ("model.safetensors", "config.json"):
    with pytest.raises(UserError, match=f"config.checkpoint: .*{file} is missing. Name"):
      settings(tmp_path)
    shutil.copy(directory / file, tmp_path)
  (tmp_path / "official.pth").write_bytes(b"")
  with pytest.raises(UserError, match="config.tokenizer: .* Name a directory with tokenizer.json"):
    settings(tmp_path / "official.pth")


def test_an_official_file_that_is_something_else(directory, detector, tmp_path):
  weights, config = official_weights(directory, decoder_layers=3), detector.model.config
  for change, message in (
      ({"head.weight": torch.zeros(2)}, r"1 weights are not Grounding-DINO's, among them module.head.weight"),
      ({"feat_map.weight": torch.zeros(2, 2)}, "1 weights are of another shape, among them model.text_projection")):
    file = save_official(weights | change, tmp_path / "changed.pth")
    with pytest.raises(UserError, match=f"changed.pth: {message}"):
      load_official(file, config)
  del weights["transformer.tgt_embed.weight"]
  with pytest.raises(UserError, match="1 weights are missing, among them model.query_position_embeddings.weight"):
    load_official(save_official(weights, tmp_path / "changed.pth"), config)


def test_a_directory_that_is_something_else(directory, tmp_path):
  copy = shutil.copytree(directory, tmp_path / "copy")
  config = json.loads((copy / "config.json").read_text())
  for text, message in (("{", "config.json: not a configuration of Grounding-DINO"),
                        (json.dumps(config | {"d_model": 128}), "queries are 128 numbers wide, records hold 256"),
                        (json.dumps(config | {"encoder_layers": 3}), r"\d+ weights are missing"),
                        (json.dumps(config | {"num_queries": 31}), "1 weights are of another shape")):
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
      load_pretrained(copy)
