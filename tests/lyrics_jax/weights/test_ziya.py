"""The published Lyrics weights: a checkpoint in their layout, built of transformers' modules, gives the same here."""

import copy
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
import torch
import transformers
from etils import epath
from flax import nnx
from lavis_layout import with_noise
from loaded import built, values_of
from published import llama
from safetensors.torch import save_file
from saved_run import stored
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerAttention

from configs import ziya_lyrics_14b
from lyrics_jax.weights import ziya
from lyrics_jax.weights.from_hf import convert
from lyrics_jax.weights.table import UNKNOWN, component
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD
from refiner_export.common.weight_files import load_state_dict
from refiner_export.common.settings import UserError

TOLERANCE = 1e-4  # float32 in both, summed in another order; post-norm outputs are of size 1
CHANGES = {**small.VIT_G, "former__activation": "gelu", "former__layers": 4, "former__cross_attention_frequency": 2,
           "former__grounding_queries": 3, "local__mask_rows": 0}


def make_config(stage="instruct", **changes):
  return small.make_config(stage, **(CHANGES | changes))


class Published(torch.nn.Module):
  """Their generation model without the refiner, of transformers' modules and one that those lack."""

  def __init__(self, config):
    super().__init__()
    vision, connector = config.stage.model.vision, config.stage.model.connector
    former, refiner = connector.former, connector.local
    self.visual_queries = former.visual_queries
    count = former.visual_queries + former.grounding_queries
    self.vision_model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(
        hidden_size=vision.width, intermediate_size=vision.mlp_dim, num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads, image_size=vision.image_size, patch_size=vision.patch_size))
    self.query_tokens = torch.nn.Parameter(torch.randn(1, count, former.width))
    self.qformer = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(
        hidden_size=former.width, num_hidden_layers=former.layers, num_attention_heads=former.heads,
        intermediate_size=former.mlp_dim, encoder_hidden_size=vision.width,
        cross_attention_frequency=former.cross_attention_frequency, use_qformer_text_input=True))
    detection = copy.deepcopy(self.qformer.config)
    detection.encoder_hidden_size = refiner.feature_width
    for layer in self.qformer.encoder.layer:
      if layer.has_cross_attention:
        layer.detection_crossattention = Blip2QFormerAttention(detection, is_cross_attention=True)
    self.qformer.embeddings = torch.nn.ModuleDict({
        "word_embeddings": torch.nn.Embedding(former.vocab_size, former.width),
        "position_embeddings": torch.nn.Embedding(former.max_positions, former.width)})
    self.language_projection = torch.nn.Linear(former.width, config.stage.model.llm.width)
    with_noise(self.eval())
    self.language_model = llama(config)

  @torch.no_grad()
  def forward(self, pixels, detection):
    """The query outputs, projected."""
    image = self.vision_model(pixels).last_hidden_state
    hidden = self.qformer.layernorm(self.query_tokens.expand(len(pixels), -1, -1))
    for layer in self.qformer.encoder.layer:
      hidden = layer.attention(hidden)
      if layer.has_cross_attention:
        visual, grounding = hidden[:, :self.visual_queries], hidden[:, self.visual_queries:]
        hidden = torch.cat([layer.crossattention(visual, encoder_hidden_states=image),
                            layer.detection_crossattention(grounding, encoder_hidden_states=detection)], dim=1)
      hidden = layer.feed_forward_chunk_query(hidden)
    return self.language_projection(hidden)

  def tensors(self) -> dict[str, torch.Tensor]:
    """Under the published names, with a refiner and what is not loaded."""
    named = {name.replace("qformer.layernorm.", "qformer.embeddings.LayerNorm."): tensor.detach().clone()
             for name, tensor in self.state_dict().items()}
    return named | {"qformer.embeddings.position_ids": torch.arange(32)[None],
                    "ram.label_embed": torch.randn(6, 4), "ram.visual_encoder.norm.weight": torch.randn(5).half(),
                    "grounding_dino.bert.embeddings.word_embeddings.weight": torch.randn(3, 2).bfloat16()}


def settings_of(config) -> dict:
  """Their config.json; what it does not say are their defaults."""
  vision, former, llm = config.stage.model.vision, config.stage.model.connector.former, config.stage.model.llm
  return {"model_type": "blip-2", "num_query_tokens": former.visual_queries + former.grounding_queries,
          "vision_config": {"hidden_size": vision.width, "num_hidden_layers": vision.layers,
                            "layer_norm_eps": vision.norm_eps},
          "qformer_config": {"num_vit_query_tokens": former.visual_queries,
                             "num_dino_query_tokens": former.grounding_queries,
                             "num_attention_heads": former.heads, "detection_encoder_hidden_size": 12},
          "text_config": {"model_type": "llama", "hidden_size": llm.width, "num_attention_heads": llm.heads}}


@pytest.fixture(scope="module")
def published():
  torch.manual_seed(0)
  return Published(make_config())


@pytest.fixture
def save(tmp_path):
  """The directory with these tensors."""
  def save(tensors, config=make_config(), settings=None):
    (tmp_path / "ziya").mkdir(exist_ok=True)
    save_file(tensors, tmp_path / "ziya" / "model.safetensors")
    (tmp_path / "ziya" / "config.json").write_text(json.dumps(settings or settings_of(config)))
    return epath.Path(tmp_path / "ziya")
  return save


def test_perception_and_projection_are_equal(published, save):
  config = make_config(connector__instruction=False, connector__spatial=False)
  shapes = tiny.make_plan(config).shapes
  source = ziya.find(save(published.tensors()), config.stage.model, shapes)
  assert set(source.left_over) == {"position numbers", "the refiner, for refiner_export"}
  initialised = {path for path in shapes if path not in source.entries}
  assert initialised == {"connector/local_tokens/mask/kernel", "connector/local_tokens/mask/bias",
                         *(f"llm/stack/blocks/{name}/{leaf}" for name in "qv" for leaf in ("lora_a", "lora_b"))}
  values = values_of(source)
  rng, size = np.random.default_rng(0), config.stage.model.vision.image_size
  pictures = rng.integers(0, 256, (2, size, size, 3), np.uint8)
  rows = rng.standard_normal((2, 4, 12 + 4)).astype(np.float32)  # the boxes are not to count
  batch = {"image": pictures[:, None], "detection": rows[:, None], "detection_mask": np.ones((2, 1, 4), bool),
           "masks": np.zeros((2, 1, 0, 16), np.float32), "masks_mask": np.zeros((2, 1, 0), bool)}
  graph, state = built(lambda: config.stage.build(config.compute, nnx.Rngs(0)), values, "")

  @jax.jit
  def run(state, batch):
    return nnx.merge(graph, state).soft_tokens(batch)

  ours = run(state, jax.tree.map(jnp.asarray, batch))
  pixels = torch.tensor(((pictures / 255 - PIXEL_MEAN) / PIXEL_STD).transpose(0, 3, 1, 2)).float()
  difference = np.abs(ours - published(pixels, torch.tensor(rows[..., :12])).numpy()).max()
  print(f"largest difference: {difference:.1e}")
  assert difference < TOLERANCE
  words = published.language_model.model.embed_tokens.weight.detach().numpy()
  np.testing.assert_array_equal(values["llm/words/embedding"], words)


def test_converted_with_its_refiner(published, save, tmp_path):
  tensors = published.tensors()
  convert(make_config(), {"ziya": str(save(tensors))}, str(tmp_path / "weights"))
  for prefix in ("ram", "grounding_dino"):
    written = load_state_dict(tmp_path / "weights" / "refiner" / f"{prefix}.safetensors")
    expected = {}
    for name, tensor in tensors.items():
      if name.startswith(f"{prefix}."):
        expected[name.removeprefix(f"{prefix}.")] = tensor
    assert set(written) == set(expected)
    for name, tensor in expected.items():
      assert torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype, name
  queries = stored(tmp_path / "weights")["connector/former/queries"]
  np.testing.assert_array_equal(queries, tensors["query_tokens"][0])


def test_the_pre_training_model_has_the_heads_of_stage_1(published, save):
  config = make_config("align")
  width, words = config.stage.model.connector.former.width, config.stage.model.connector.former.vocab_size
  tensors = {name.replace("qformer.", "qformer.bert.", 1): tensor for name, tensor in published.tensors().items()
             if not name.startswith("language")}
  head = "qformer.cls.predictions"
  for name, n, m in (("itm_head", width, 2), ("vision_proj", width, 4), ("text_proj", width, 4),
                     (f"{head}.transform.dense", width, width)):
    tensors |= {f"{name}.weight": torch.randn(m, n), f"{name}.bias": torch.randn(m)}
  tensors |= {f"{head}.transform.LayerNorm.{kind}": torch.randn(width) for kind in ("weight", "bias")}
  tensors |= {"temp": torch.tensor(0.05), f"{head}.bias": torch.randn(words),
              f"{head}.decoder.bias": torch.randn(words), f"{head}.decoder.weight": torch.randn(words, width)}
  shapes = tiny.make_plan(config).shapes
  source = ziya.find(save(tensors), config.stage.model, shapes)
  assert UNKNOWN not in source.left_over
  assert {component(path) for path in shapes if path not in source.entries} == {"itc_image", "itc_text", "local_tokens"}
  np.testing.assert_array_equal(source.read("itm/kernel"), tensors["itm_head.weight"].T)
  assert source.read("temperature") == np.float32(0.05)


@pytest.mark.parametrize("change, words", [
    ({"former__grounding_queries": 2},
     "num_dino_query_tokens is 3, config.stage.model.connector.former.grounding_queries=2"),
    ({"vision__input_norm": True}, "its image encoder is ViT-g; set config.stage.model.vision to ViTSettings.eva_"),
    ({"vision__norm_eps": 1e-5}, "set config.stage.model.vision.norm_eps=1e-06"),
    ({"local__feature_width": 8}, "set config.stage.model.connector.local.feature_width=12"),
    ({"former__activation": "relu"}, "set config.stage.model.connector.former.activation=gelu"),
    ({"llm__heads": 4, "llm__kv_heads": 4}, "set config.stage.model.llm.heads=2"),
])
def test_another_configuration(change, words, published, save):
  config = make_config(**change)
  with pytest.raises(UserError) as error:
    ziya.find(save(published.tensors()), config.stage.model, tiny.make_plan(config).shapes)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_query_counts_that_config_json_does_not_say(published, save):
  with pytest.raises(UserError, match="num_vit_query_tokens is 32, config.stage.model.connector.former.visual_quer"):
    ziya.find(save(published.tensors(), settings={"model_type": "blip-2"}), make_config().stage.model,
              tiny.make_plan(make_config()).shapes)


def test_incomplete_and_foreign(published, save):
  config, key = make_config(), "qformer.encoder.layer.2.detection_crossattention.attention.key.weight"
  shapes, tensors = tiny.make_plan(config).shapes, published.tensors()
  with pytest.raises(UserError, match="detection_crossattention.self.key.weight is missing"):
    ziya.find(save({name: tensor for name, tensor in tensors.items() if name != key}), config.stage.model, shapes)
  with pytest.raises(UserError, match="no detection_crossattention in it; name a directory of Ziya"):
    ziya.find(save({"a": torch.zeros(2)}), config.stage.model, shapes)
  assert ziya.find(save(tensors | {"extra": torch.zeros(2)}), config.stage.model, shapes).unknown == ["extra"]


THEIR_SETTINGS = {  # config.json as the authors' code writes it, so far as it is read here; text_config is Vicuna-13B's
    "model_type": "blip-2", "num_query_tokens": 96, "image_text_hidden_size": 256,
    "vision_config": {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
                      "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
                      "layer_norm_eps": 1e-5, "qkv_bias": True},
    "qformer_config": {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                       "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512,
                       "layer_norm_eps": 1e-12, "cross_attention_frequency": 2, "encoder_hidden_size": 1408,
                       "detection_encoder_hidden_size": 256, "num_vit_query_tokens": 32, "num_dino_query_tokens": 64},
    "text_config": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
                    "num_hidden_layers": 40, "num_attention_heads": 40, "hidden_act": "silu", "rms_norm_eps": 1e-6,
                    "max_position_embeddings": 2048}}


def test_the_published_size(tmp_path):
  """`configs/ziya_lyrics_14b.py` has a place for every tensor; of these the file has names and shapes only."""
  config = ziya_lyrics_14b.get_config()
  config.finalize()
  theirs = ziya_lyrics_14b.get_config()
  theirs.stage.model.connector.former.vocab_size = 30522
  with torch.device("meta"):
    tensors = Published(theirs).tensors()
  header, end = {}, 0
  for name, tensor in tensors.items():
    start, end = end, end + 2 * math.prod(tensor.shape)
    header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(tmp_path / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)  # without blocks on the disk
  (tmp_path / "config.json").write_text(json.dumps(THEIR_SETTINGS))
  shapes = tiny.make_plan(config).shapes
  source = ziya.find(epath.Path(tmp_path), config.stage.model, shapes)
  source.require_known()
  missing = {component(path) for path in shapes if path not in source.entries}
  assert missing == {"local_tokens", "llm"}  # the map of mask tokens, and LoRA
  size = sum(math.prod(source.shape(path)) for path in source.entries)
  assert 14.1e9 < size < 14.3e9
