"""CLIP and BLIP-2's ViT-g from Hugging Face directories: every tensor has its place, and both models give the same."""

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
from lavis_layout import q_former, vit_g, with_noise
from loaded import built, values_of
from published import save_bin, save_clip

from lyrics_jax.weights import blip2
from lyrics_jax.weights import clip_names
from lyrics_jax.weights.table import UNKNOWN
from lyrics_jax.models.layers.norms import LayerNorm
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD, ViT
from refiner_export.common.settings import UserError

TOLERANCE = 1e-4  # float32 in both, summed in another order


@pytest.fixture(scope="module")
def config():
  return small.make_config("align")


@pytest.fixture(scope="module")
def shapes(config):
  return tiny.make_plan(config).shapes


def pictures_of(vision):
  pictures = np.random.default_rng(0).integers(0, 256, (2, vision.image_size, vision.image_size, 3), np.uint8)
  return pictures, torch.tensor(((pictures / 255 - PIXEL_MEAN) / PIXEL_STD).transpose(0, 3, 1, 2)).float()


def ours(vision, values):
  graph, state = built(lambda: ViT(vision, rngs=nnx.Rngs(0)), values, "vision")
  return jax.jit(lambda state, pictures: nnx.merge(graph, state)(pictures, jnp.float32))(state, pictures_of(vision)[0])


@pytest.mark.parametrize("layout", ["whole CLIP", "encoder alone", "shards", "bin"])
def test_equals_clip(layout, config, shapes, tmp_path):
  if layout == "bin":
    theirs = save_clip(config, tmp_path / "unused")
    tmp_path.joinpath("bin").mkdir()
    save_bin(theirs, tmp_path / "bin")
    path = tmp_path / "bin"
  else:
    path, more = tmp_path / "clip", {"max_shard_size": "4KB"} if layout == "shards" else {}
    theirs = save_clip(config, path, text=layout != "encoder alone", **more)
    assert (path / "model.safetensors.index.json").exists() == (layout == "shards")
  source = clip_names.find(epath.Path(path), config.stage.model, shapes)
  assert UNKNOWN not in source.left_over
  assert set(source.entries) == {name for name in shapes if name.startswith("vision/")}
  assert len(source.left_over[clip_names.FINAL_NORM]) == 2
  with torch.no_grad():
    expected = theirs(pictures_of(config.stage.model.vision)[1], output_hidden_states=True).hidden_states[-1].numpy()
  difference = np.abs(ours(config.stage.model.vision, values_of(source)) - expected).max()
  print(f"largest difference: {difference:.1e}")
  assert difference < TOLERANCE


def test_the_last_layer_may_be_left_out(config, shapes, tmp_path):
  save_clip(config, tmp_path, extra_layers=1)
  source = clip_names.find(epath.Path(tmp_path), config.stage.model, shapes)
  assert len(source.left_over[clip_names.LAST_LAYER]) == 16
  save_clip(config, tmp_path, extra_layers=2)
  where = "config.stage.model.vision.layers"
  with pytest.raises(UserError, match=f"has 4 layers, {where}=2; set {where}=4"):
    clip_names.find(epath.Path(tmp_path), config.stage.model, shapes)


@pytest.mark.parametrize("layout", ["hugging_face", "lavis"])
def test_vit_g_from_blip_2(layout, tmp_path):
  """With the norm behind it, as `Blip2VisionModel` gives its last hidden state."""
  config = small.make_config("align", former__activation="gelu", **small.VIT_G)
  vision, former = config.stage.model.vision, config.stage.model.connector.former
  model = with_noise(transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(
      vision_config=dict(hidden_size=vision.width, intermediate_size=vision.mlp_dim, num_hidden_layers=vision.layers,
                         num_attention_heads=vision.heads, image_size=vision.image_size, patch_size=vision.patch_size),
      qformer_config=dict(vocab_size=former.vocab_size, hidden_size=former.width, num_hidden_layers=former.layers,
                          num_attention_heads=former.heads, intermediate_size=former.mlp_dim,
                          encoder_hidden_size=vision.width, max_position_embeddings=former.max_positions,
                          cross_attention_frequency=1, use_qformer_text_input=True),
      num_query_tokens=former.visual_queries, image_text_hidden_size=4)).eval())
  if layout == "lavis":
    with torch.no_grad():
      for layer in model.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.chunk(3)[1].zero_()
    path = tmp_path / "blip2_pretrained.pth"
    torch.save({"model": q_former(config) | vit_g(model.vision_model)}, path)
    left_over = {"contrastive heads, which here read two pooled vectors", "output words, tied to the word embedding",
                 "position numbers"}
  else:
    path = tmp_path
    model.save_pretrained(path)
    left_over = {"contrastive heads, which here read two pooled vectors"}
  source = blip2.find(epath.Path(path), config.stage.model, tiny.make_plan(config).shapes)
  assert set(source.left_over) == left_over
  values = values_of(source)
  graph, state = built(lambda: LayerNorm(vision.width, vision.norm_eps, rngs=nnx.Rngs(0)), values,
                       "connector/image_norm")
  with torch.no_grad():
    expected = model.vision_model(pictures_of(vision)[1]).last_hidden_state.numpy()
  assert np.abs(nnx.merge(graph, state)(ours(vision, values)) - expected).max() < TOLERANCE


@pytest.mark.parametrize("change, words", [
    ({"vision__heads": 4},
     "num_attention_heads is 2, config.stage.model.vision.heads=4; set config.stage.model.vision.heads=2"),
    (small.VIT_G, "set config.stage.model.vision.input_norm=True"),
    ({"vision__mlp_dim": 64}, "set config.stage.model.vision.mlp_dim=32"),
])
def test_another_size(change, words, config, tmp_path):
  save_clip(config, tmp_path)
  other = small.make_config("align", **change)
  with pytest.raises(UserError) as error:
    clip_names.find(epath.Path(tmp_path), other.stage.model, tiny.make_plan(other).shapes)
  assert words in str(error.value)
