"""RAM++: the model is compared with a slow one written from the papers; then the tagger and its files are tested."""

import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from slow_ram_plus import SlowRamPlus
from torch.utils._python_dispatch import TorchDispatchMode

from refiner_export.refiners.ram_plus import tagger as ram_plus_tagger
from refiner_export.refiners.base import UprightPicture
from refiner_export.refiners.compute import Compute
from refiner_export.refiners.ram_plus.model import RAM_PLUS_SWIN_B, RAM_PLUS_SWIN_L, RamPlusConfig, RamPlusModel
from refiner_export.refiners.ram_plus.tagger import RamPlus, load
from refiner_export.refiners.ram_plus.swin import SwinConfig
from refiner_export.common.settings import UserError

CPU = Compute(device="cpu")
# The stages have 16, 8 and 4 patches along a side, and windows of 4. So two stages have shifted windows.
TINY = RamPlusConfig(SwinConfig(width=8, heads=(1, 2, 2), depths=(2, 2, 2), image_size=64, window=4),
                     tags=7, descriptions=5, text_width=12, width=16)
# The stages have 8, 4 and 2 patches along a side, and windows of 4. The last stage is smaller than a window, as in the
# published model.
SMALL = RamPlusConfig(SwinConfig(width=6, heads=(3, 2, 4), depths=(3, 1, 2), image_size=32, window=4),
                      tags=4, descriptions=3, text_width=10, width=8, layers=1, heads=2)
NAMES = "Cat", "dog", "red Car", "tree", "house", "sky", "Traffic Light"
PICTURES = (90, 60), (50, 100), (64, 64)  # width and height


def random_weights(config, seed=0):
  """Random weights by the names of the model. They are so large that every weight changes the results."""
  generator = torch.Generator().manual_seed(seed)
  weights = {}
  with torch.device("meta"):
    shapes = {name: tensor.shape for name, tensor in RamPlusModel(config).state_dict().items()}
  for name, shape in shapes.items():
    noise = torch.randn(shape, generator=generator)
    if name == "reweight_scale":
      noise = torch.tensor(1.5)
    elif "norm" in name.lower() and name.endswith("weight"):
      noise = 1 + 0.2 * noise
    elif len(shape) == 1:
      noise *= 0.2
    elif name not in ("label_embed", "fc.weight") and not name.endswith("table"):
      noise /= shape[1:].numel() ** 0.5
    weights[name] = noise
  return weights


def make_model(config, weights):
  with torch.device("meta"):
    model = RamPlusModel(config)
  model.load_state_dict(weights, assign=True)
  return model.requires_grad_(False).eval()


def slow(config, weights):
  swin = config.swin
  return SlowRamPlus(weights, window=swin.window, heads=swin.heads, depths=swin.depths,
                     descriptions=config.descriptions, tagging_heads=config.heads, tagging_layers=config.layers)


def draw_images(config, count):
  side = config.swin.image_size
  return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights():
  return random_weights(TINY)


@pytest.fixture(scope="module")
def pictures():
  draw = np.random.default_rng(0)
  noise = [Image.fromarray(draw.integers(0, 255, (6, 6, 3), np.uint8)) for _ in PICTURES]
  return [UprightPicture(image.resize(size, Image.Resampling.BICUBIC)) for image, size in zip(noise, PICTURES)]


@pytest.fixture(autouse=True)
def _tiny_configs(monkeypatch):
  monkeypatch.setitem(ram_plus_tagger._CONFIGS, "swin_l", TINY)
  monkeypatch.setitem(ram_plus_tagger._CONFIGS, "swin_b", SMALL)


def write_files(folder, weights, names=NAMES, limits=(0.5,) * len(NAMES), **changes):
  """Settings whose files are a checkpoint in the published form and the two lists."""
  folder.mkdir(exist_ok=True)
  torch.save({"model": as_published(weights), "optimizer": {"step": 1}}, folder / "ram.pth")
  (folder / "tags.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
  (folder / "thresholds.txt").write_text("".join(f"{value}\n" for value in limits))
  paths = {"checkpoint": "ram.pth", "tag_list": "tags.txt", "thresholds": "thresholds.txt"}
  return RamPlus(**{field: str(folder / name) for field, name in paths.items()} | changes)


def as_published(weights):
  """Adds the tables of Swin, and gives the tagging head the name that published files use."""
  tables = {"visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long),
            "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16)}
  return {name.replace("tagging_head", "vision_multi"): tensor for name, tensor in weights.items()} | tables


# --- the model ---

@pytest.mark.parametrize("config", [TINY, SMALL], ids=["shifted windows", "last stage smaller than a window"])
def test_the_model_is_the_published_one(config):
  """The tolerance is 1e-5, because logits have size 1 and the model computes in float32, the slow one in float64."""
  weights = random_weights(config)
  model, reference, images = make_model(config, weights), slow(config, weights), draw_images(config, 2)
  expected = torch.stack([reference.logits(image) for image in images])
  assert expected.std() > 0.1
  torch.testing.assert_close(model.encode(images).double(), torch.stack([reference.encode(image) for image in images]),
                             atol=1e-5, rtol=0)
  torch.testing.assert_close(model(images).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("config", [RAM_PLUS_SWIN_B, RAM_PLUS_SWIN_L], ids=["swin_b", "swin_l"])
def test_the_model_is_the_published_one_at_full_size(config):
  """The tolerance is 1e-4, because 24 blocks compute in float32. The test needs 6 GB."""
  weights = random_weights(config)
  model, reference, (image,) = make_model(config, weights), slow(config, weights), draw_images(config, 1)
  features = reference.encode(image)
  torch.testing.assert_close(model.encode(image[None])[0].double(), features, atol=1e-4, rtol=0)
  torch.testing.assert_close(model(image[None])[0].double(), reference.tag(features), atol=1e-4, rtol=0)


def expected_shapes(width, heads):
  """Names and shapes of the official checkpoint without the tables: Microsoft's Swin and a BERT of two layers."""
  shapes = {}

  def linear(name, inputs, outputs, bias=True):
    shapes[f"{name}.weight"] = outputs, inputs
    if bias:
      shapes[f"{name}.bias"] = outputs,

  def norm(name, size):
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = size,

  shapes["label_embed"], shapes["reweight_scale"] = (4585 * 51, 512), ()
  swin = "visual_encoder"
  shapes[f"{swin}.patch_embed.proj.weight"], shapes[f"{swin}.patch_embed.proj.bias"] = (width, 3, 4, 4), (width,)
  norm(f"{swin}.patch_embed.norm", width)
  for stage, depth in enumerate((2, 2, 18, 2)):
    size = width * 2 ** stage
    for number in range(depth):
      block = f"{swin}.layers.{stage}.blocks.{number}"
      shapes[f"{block}.attn.relative_position_bias_table"] = 23 * 23, heads[stage]
      norm(f"{block}.norm1", size)
      norm(f"{block}.norm2", size)
      linear(f"{block}.attn.qkv", size, 3 * size)
      linear(f"{block}.attn.proj", size, size)
      linear(f"{block}.mlp.fc1", size, 4 * size)
      linear(f"{block}.mlp.fc2", 4 * size, size)
    if stage < 3:
      norm(f"{swin}.layers.{stage}.downsample.norm", 4 * size)
      linear(f"{swin}.layers.{stage}.downsample.reduction", 4 * size, 2 * size, bias=False)
  norm(f"{swin}.norm", width * 8)
  for number in range(2):
    layer = f"tagging_head.encoder.layer.{number}"
    linear(f"{layer}.crossattention.self.query", 768, 768)
    linear(f"{layer}.crossattention.self.key", 512, 768)
    linear(f"{layer}.crossattention.self.value", 512, 768)
    linear(f"{layer}.crossattention.output.dense", 768, 768)
    norm(f"{layer}.crossattention.output.LayerNorm", 768)
    linear(f"{layer}.intermediate.dense", 768, 3072)
    linear(f"{layer}.output.dense", 3072, 768)
    norm(f"{layer}.output.LayerNorm", 768)
  linear("wordvec_proj", 512, 768)
  linear("fc", 768, 1)
  linear("image_proj", width * 8, 512)
  return shapes


@pytest.mark.parametrize("config, width, heads", [
    (RAM_PLUS_SWIN_B, 128, (4, 8, 16, 32)), (RAM_PLUS_SWIN_L, 192, (6, 12, 24, 48))], ids=["swin_b", "swin_l"])
def test_names_and_shapes_of_the_official_checkpoint(config, width, heads):
  with torch.device("meta"):
    state = RamPlusModel(config).state_dict()
  assert len(state) == 367
  assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_shapes(width, heads)


def test_no_picture_gets_its_own_copy_of_the_descriptions(weights):
  """The official code multiplies all descriptions by their weights for each picture, which takes much memory."""
  model, largest = make_model(TINY, weights), 0

  class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
      nonlocal largest
      result = function(*args, **kwargs or {})
      if result.untyped_storage().data_ptr() != model.label_embed.untyped_storage().data_ptr():
        largest = max(largest, result.numel())
      return result

  features = torch.randn(3, TINY.text_width, generator=torch.Generator().manual_seed(2))
  with Watch():
    reweighted = model.reweight(features)
  assert reweighted.shape == (3, TINY.tags, TINY.text_width) and largest == reweighted.numel()


# --- the tagger ---

@pytest.fixture(scope="module")
def model_scores(weights, pictures):
  """float (3, 7): the scores of the slow model for every picture and tag, from the resized pixels."""
  reference, scores = slow(TINY, weights), []
  for picture in pictures:
    pixels = np.asarray(picture.image.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    image = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    scores.append(reference.logits(torch.tensor(image).permute(2, 0, 1)).sigmoid().numpy())
  return np.array(scores)


def test_tags_are_those_over_their_own_threshold(tmp_path, weights, pictures, model_scores):
  """The thresholds lie between the scores of the pictures, so that pictures get different tags. The last tag is
  forbidden."""
  thresholds = np.round(np.median(model_scores, axis=0), 3) - 0.002
  thresholds[-1] = 1
  assert np.abs(model_scores - thresholds).min() > 1e-4  # rounding must not decide the test
  tags = write_files(tmp_path, weights, limits=thresholds).build(CPU).tag(pictures)
  sizes = set()
  for found, scores in zip(tags, model_scores, strict=True):
    order = [k for k in np.argsort(-scores) if scores[k] > thresholds[k]]
    assert found.names == tuple(NAMES[k].lower() for k in order)
    assert found.scores.dtype == np.float32
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-5)
    sizes.add(len(found.names))
  assert len(sizes) > 1 and 0 < max(sizes) < len(NAMES)


def test_a_score_must_exceed_its_threshold(tmp_path, weights, pictures):
  everything = write_files(tmp_path, weights, limits=[0] * 7).build(CPU)
  (found,) = everything.tag(pictures[:1])
  assert len(found.names) == 7
  exact = {name: score for name, score in zip(found.names, found.scores)}
  everything.thresholds = np.array([exact[name.lower()] for name in NAMES], np.float32)
  assert everything.tag(pictures[:1])[0].names == ()
  everything.thresholds[2] = np.nextafter(everything.thresholds[2], np.float32(0))
  assert everything.tag(pictures[:1])[0].names == ("red car",)


def test_a_name_that_is_listed_twice(tmp_path, weights, pictures, model_scores):
  names = ["Cat", "dog", "CAT", "tree", "house", "sky", "cat"]
  (found,) = write_files(tmp_path, weights, names, [0] * 7).build(CPU).tag(pictures[:1])
  assert sorted(found.names) == ["cat", "dog", "house", "sky", "tree"]
  np.testing.assert_allclose(found.scores[found.names.index("cat")], model_scores[0, [0, 2, 6]].max(), atol=1e-5)


def test_together_or_one_at_a_time(tmp_path, weights, pictures):
  """The tolerance is 2e-4, because sums have another order in other batches."""
  for batch in (1, 2, 5):
    tagger = write_files(tmp_path, weights, limits=[0] * 7, batch=batch).build(CPU)
    together = tagger.tag(pictures)
    for found, picture in zip(together, pictures, strict=True):
      (alone,) = tagger.tag([picture])
      assert found.names == alone.names
      np.testing.assert_allclose(found.scores, alone.scores, atol=2e-4)
  assert len({found.scores.tobytes() for found in together}) == len(pictures)
  assert tagger.tag([]) == []


def test_preparing_can_be_sent_to_another_process(tmp_path, weights, pictures):
  tagger = write_files(tmp_path, weights).build(CPU)
  prepare = pickle.loads(pickle.dumps(tagger.prepare))
  prepared = [prepare(picture.image) for picture in pictures]
  assert all(pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8 for pixels in prepared)
  for ahead, found in zip(tagger.tag_prepared(prepared), tagger.tag(pictures), strict=True):
    assert ahead.names == found.names
    np.testing.assert_array_equal(ahead.scores, found.scores)


def test_the_aspect_is_not_kept(tmp_path, weights):
  wide = np.zeros((40, 200, 3), np.uint8)
  wide[:, 100:] = 10, 20, 30
  pixels = write_files(tmp_path, weights).build(CPU).prepare(Image.fromarray(wide))
  assert not pixels[:, :30].any() and (pixels[:, 34:] == (10, 20, 30)).all()


def test_bfloat16_is_close(tmp_path, weights, pictures):
  """Scores, which lie in [0, 1], change by at most 0.05. The weights stay in float32."""
  settings = write_files(tmp_path, weights, limits=[0] * 7)
  exact = settings.build(CPU).tag(pictures)
  tagger = settings.build(Compute(device="cpu", precision="bfloat16"))
  for found, expected in zip(tagger.tag(pictures), exact, strict=True):
    scores, references = (dict(zip(tags.names, tags.scores)) for tags in (found, expected))
    assert scores.keys() == references.keys() and found.scores.dtype == np.float32
    differences = [abs(scores[name] - references[name]) for name in scores]
    assert 0 < max(differences) < 0.05
  assert {parameter.dtype for parameter in tagger.model.parameters()} == {torch.float32}


# --- files and settings ---

def test_weights_as_they_are_published(tmp_path, weights):
  expected = make_model(TINY, weights).state_dict()
  save_file(weights, tmp_path / "ram.safetensors")
  half = {name: tensor.half() for name, tensor in weights.items()}
  save_file(half, tmp_path / "half.safetensors")
  for settings in (write_files(tmp_path, weights),
                   write_files(tmp_path, weights, checkpoint=str(tmp_path / "ram.safetensors")),
                   write_files(tmp_path, weights, checkpoint=str(tmp_path / "half.safetensors"))):
    settings.finalize()
    model = settings.build(CPU).model
    tolerance = 2e-3 if "half" in settings.checkpoint else 0
    for name, tensor in model.state_dict().items():
      assert tensor.dtype == torch.float32
      torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_the_two_sizes(tmp_path, weights):
  small = random_weights(SMALL)
  settings = write_files(tmp_path / "b", small, NAMES[:4], [0.5] * 4, backbone="swin_b")
  assert settings.build(CPU).model.config == SMALL
  for found, said, wrong in ((small, "swin_b", "swin_l"), (weights, "swin_l", "swin_b")):
    settings = write_files(tmp_path / said, found, backbone=wrong)
    complaint = f"ram.pth is a Swin-{said[-1].upper()} file, not that of a {wrong}: set backbone={said}$"
    with pytest.raises(UserError, match=complaint):
      settings.build(CPU)


@pytest.mark.parametrize("changes, complaint", [
    ({"fc.bias": None}, "ram.pth lacks fc.bias."),
    ({"reweight_scale": None, "fc.bias": None}, "ram.pth lacks reweight_scale and 1 more."),
    ({"label_embed": None}, "ram.pth lacks label_embed."),
    ({"visual_encoder.patch_embed.proj.bias": None}, "ram.pth lacks visual_encoder.patch_embed.proj.bias."),
    ({"head.weight": torch.zeros(2)}, "ram.pth holds head.weight, which this model does not have."),
    ({"fc.weight": torch.zeros(1, 15)}, "ram.pth: fc.weight has the shape (1, 15), expected (1, 16)."),
    ({"label_embed": torch.zeros(36, 12)}, "ram.pth: label_embed has the shape (36, 12), expected (35, 12)."),
    ({"label_embed": torch.zeros(())}, "ram.pth: label_embed has the shape (), expected (0, 12)."),
    ({"visual_encoder.patch_embed.proj.bias": torch.zeros(())}, "proj.bias has the shape (), expected (8,)."),
])
def test_weights_of_another_model(tmp_path, weights, changes, complaint):
  changed = {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}
  with pytest.raises(UserError, match=re.escape(complaint)) as error:
    write_files(tmp_path, changed).build(CPU)
  assert str(error.value).endswith(
      ". Name the file ram_plus_swin_large_14m.pth of the recognize-anything project's release")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, origin", [
    ("checkpoint", "ram_plus_swin_large_14m.pth of the recognize-anything project's release"),
    ("tag_list", "ram_tag_list.txt of the recognize-anything project"),
    ("thresholds", "ram_tag_list_threshold.txt of the recognize-anything project")])
def test_missing_files(tmp_path, weights, field, origin):
  write_files(tmp_path, weights).finalize()
  with pytest.raises(UserError, match=f"config.tagger.{field} not found: nowhere.txt. Name the file {origin}$"):
    write_files(tmp_path, weights, **{field: "nowhere.txt"}).finalize("config.tagger")
  with pytest.raises(UserError, match=f"config.{field}: .* is a directory. Name the file {origin}$"):
    write_files(tmp_path, weights, **{field: str(tmp_path)}).finalize()


@pytest.mark.parametrize("names, limits, complaint", [
    (NAMES, [0.5] * 6, "thresholds.txt has 6 thresholds, .*tags.txt has 7 tags: name two files that belong together"),
    (NAMES, [0.5] * 6 + ["high"], "thresholds.txt: line 7: expected a number from 0 to 1, got 'high'"),
    (NAMES, [0.5, 65, *[0.5] * 5], "thresholds.txt: line 2: expected a number from 0 to 1, got 65"),
    (NAMES, [0.5, -0.1, *[0.5] * 5], "thresholds.txt: line 2: expected a number from 0 to 1, got -0.1"),
    (NAMES, [*[0.5] * 6, "nan"], "thresholds.txt: line 7: expected a number from 0 to 1, got nan"),
    (["cat", " ", "dog"], [0.5] * 3, "tags.txt: line 2 is empty, expected a tag on each line"),
])
def test_wrong_lists(tmp_path, weights, names, limits, complaint):
  settings = write_files(tmp_path, weights, names, limits)
  for check in (settings.finalize, lambda: settings.build(CPU)):
    with pytest.raises(UserError, match=f"{complaint}$"):
      check()


def test_lists_that_are_no_lists(tmp_path, weights):
  settings = write_files(tmp_path, weights)
  for content, complaint in ((b"", "tags.txt has no tags. Name the file ram_tag_list.txt"),
                             (b"cat\n\xff\xfe", "tags.txt is no text in UTF-8. Name the file ram_tag_list.txt")):
    (tmp_path / "tags.txt").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
      settings.finalize()


def test_a_list_of_another_checkpoint(tmp_path, weights):
  settings = write_files(tmp_path, weights, NAMES[:6], [0.5] * 6)
  settings.finalize()
  with pytest.raises(UserError, match="tags.txt has 6 tags, .*ram.pth has embeddings of 7: name the list that"):
    settings.build(CPU)


def test_a_file_without_weights(tmp_path, weights):
  settings = write_files(tmp_path, weights)
  (tmp_path / "ram.pth").write_bytes(b"<html>")
  with pytest.raises(UserError, match="ram.pth is not a whole .pth file of weights"):
    load(settings.checkpoint, "swin_l")


@pytest.mark.parametrize("field, value", [("batch", 0), ("backbone", "swin_t"), ("checkpoint", None)])
def test_settings_that_cannot_be(tmp_path, weights, field, value):
  with pytest.raises(UserError, match=f"config.{field}: expected"):
    write_files(tmp_path, weights, **{field: value}).finalize()


def test_description_is_of_what_decides(tmp_path, weights):
  settings = write_files(tmp_path / "a", weights)
  described = settings.describe()
  assert described["backbone"] == "swin_l" and described["image_size"] == 64
  assert write_files(tmp_path / "copy", weights, batch=1).describe() == described
  others = {
      "checkpoint": write_files(tmp_path / "b", weights | {"fc.bias": -weights["fc.bias"]}),
      "tag_list": write_files(tmp_path / "c", weights, ["lion", *NAMES[1:]]),
      "thresholds": write_files(tmp_path / "d", weights, limits=[0.6] * 7)}
  for field, other in others.items():
    assert {key for key in described if other.describe()[key] != described[key]} == {field}
  other = write_files(tmp_path / "e", weights, backbone="swin_b").describe()
  assert {key for key in described if other[key] != described[key]} == {"backbone", "image_size"}
