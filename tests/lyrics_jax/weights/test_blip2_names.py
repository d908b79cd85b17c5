"""Every name of a BLIP-2 file is accounted for, its values find their places, and what does not fit is one line."""

import re

import numpy as np
import pytest
import tiny
import torch
import transformers
from lavis_layout import WORDS, image_encoder, q_former, random_clip
from loaded import values_of
from safetensors.torch import save_file

from lyrics_jax.weights import blip2
from lyrics_jax.weights.table import UNKNOWN, component
from refiner_export.common.settings import UserError

QUERY_0 = "Qformer.bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def config(make_config):
  return make_config()


@pytest.fixture
def tensors(config):
  """A whole LAVIS checkpoint with CLIP inside."""
  return q_former(config) | image_encoder(random_clip(config))


@pytest.fixture
def load(config, tmp_path):
  """What is found in these tensors, stored like LAVIS does."""
  def load(tensors, config=config):
    path = tmp_path / "blip2.pth"
    torch.save({"model": tensors, "epoch": 9, "config": {"run": {"lr": 1e-4}}}, path)
    return blip2.find(path, config.stage.model, tiny.make_plan(config).shapes)
  return load


def refused(load, tensors, *words, **more):
  """Loading fails with one line that has all these words."""
  with pytest.raises(UserError) as error:
    load(tensors, **more)
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value), str(error.value)


def test_every_name_and_every_parameter_is_accounted_for(load, tensors, config):
  found = load(tensors)
  shapes = tiny.make_plan(config).shapes
  left_over = {name for names in found.left_over.values() for name in names}
  assert UNKNOWN not in found.left_over
  assert left_over == {
      "Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.weight",
      "Qformer.cls.predictions.decoder.bias", "vision_proj.weight", "vision_proj.bias", "text_proj.weight",
      "text_proj.bias"}
  initialised = {component(path) for path in shapes if path not in found.entries}
  assert initialised == {"itc_image", "itc_text", "local_tokens", "former/grounding_attention"}
  loaded = sum(value.size for value in values_of(found).values())
  assert loaded == sum(tensor.numel() for name, tensor in tensors.items() if name not in left_over)
  report = found.report(shapes)
  assert re.search(r"former/queries    +32 +32\n", report), report  # the visual ones of both
  assert "left over, output words, tied to the word embedding: Qformer (2)" in report


def test_values_are_in_their_places(load, tensors, config):
  values = values_of(load(tensors))
  theirs = lambda name: tensors[name].numpy()
  stack, layer = f"{blip2.FORMER}/stack/blocks/layers", "Qformer.bert.encoder.layer"
  pairs = {
      f"{blip2.FORMER}/queries": theirs("query_tokens")[0],
      f"{blip2.FORMER}/words/embedding": theirs("Qformer.bert.embeddings.word_embeddings.weight"),
      "lm_head/bias": theirs("Qformer.cls.predictions.bias"),
      "lm_head/dense/kernel": theirs("Qformer.cls.predictions.transform.dense.weight").T,
      "temperature": theirs("temp"),
      "itm/kernel": theirs("itm_head.weight").T,
      "connector/image_norm/scale": theirs("ln_vision.weight"),
      # Layer 3 is the second group's second.
      f"{stack}/1/self_attention/k/kernel": [theirs(f"{layer}.{n}.attention.self.key.weight").T for n in (1, 3)],
      f"{stack}/0/visual_attention/o/bias": [theirs(f"{layer}.{n}.crossattention.output.dense.bias") for n in (0, 2)],
      f"{stack}/1/text_mlp/up/kernel": [theirs(f"{layer}.{n}.intermediate.dense.weight").T for n in (1, 3)],
      f"{stack}/0/query_mlp/norm/scale": [theirs(f"{layer}.{n}.output_query.LayerNorm.weight") for n in (0, 2)],
  }
  for path, expected in pairs.items():
    np.testing.assert_array_equal(values[path], expected, err_msg=path)
  assert values[f"{blip2.FORMER}/words/embedding"].shape == (WORDS, config.stage.model.connector.former.width)


def test_half_precision_is_read(load, tensors):
  halves = {name: tensor.to(torch.float16 if name.startswith("visual_encoder") else torch.bfloat16)
            for name, tensor in tensors.items()}
  assert {value.dtype for value in values_of(load(halves)).values()} == {np.dtype("float32")}


def test_stage_2_leaves_the_heads_of_stage_1(load, tensors, make_config):
  found = load(tensors, make_config("instruct"))
  assert "itm_head.weight" in found.left_over["heads of stage 1"] and UNKNOWN not in found.left_over
  assert not any(path.startswith(("llm/", "connector/projection/")) for path in found.entries)


@pytest.mark.parametrize("save", ["whole", "shards", "file"])
def test_hugging_face_retrieval_model(save, config, tmp_path):
  former = config.stage.model.connector.former
  model = transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(
      vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
      qformer_config=dict(vocab_size=WORDS, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                          intermediate_size=32, max_position_embeddings=32, encoder_hidden_size=16,
                          use_qformer_text_input=True),
      num_query_tokens=former.visual_queries, image_text_hidden_size=4))
  model.save_pretrained(tmp_path, max_shard_size="20KB" if save == "shards" else "1GB")
  assert (tmp_path / "model.safetensors.index.json").exists() == (save == "shards")
  shapes = tiny.make_plan(config).shapes
  found = blip2.find(tmp_path / "model.safetensors" if save == "file" else tmp_path, config.stage.model, shapes)
  assert set(found.left_over) == {"contrastive heads, which here read two pooled vectors",
                                  "another image encoder than config.stage.model.vision"}
  left_over = {name for names in found.left_over.values() for name in names}
  loaded = {name: tensor for name, tensor in model.state_dict().items() if name not in left_over}
  assert sum(value.size for value in values_of(found).values()) == sum(tensor.numel() for tensor in loaded.values())
  assert {component(path) for path in shapes if path not in found.entries} == {
      "itc_image", "itc_text", "local_tokens", "former/grounding_attention", "vision", "image_norm", "lm_head",
      "temperature"}
  np.testing.assert_array_equal(found.read("itm/kernel"), model.itm_head.weight.detach().numpy().T)


def test_hugging_face_q_former_alone(config, tmp_path):
  transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(
      hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, encoder_hidden_size=16,
      use_qformer_text_input=False)).save_pretrained(tmp_path)
  found = blip2.find(tmp_path, config.stage.model, tiny.make_plan(config).shapes)
  assert not found.left_over
  assert {component(path) for path in found.entries} == blip2.REQUIRED


def test_unexpected_tensors_are_listed(load, tensors):
  found = load(tensors | {"Qformer.bert.pooler.dense.weight": torch.zeros(3)})
  assert found.left_over[UNKNOWN] == ["Qformer.bert.pooler.dense.weight"]
  assert "left over, unknown: Qformer (1)" in found.report({})


def test_an_output_matrix_of_its_own_is_said(load, tensors, caplog):
  load(tensors | {"Qformer.cls.predictions.decoder.weight": torch.zeros(WORDS, 16)})
  assert "decoder.weight differs from Qformer.bert.embeddings.word_embeddings.weight" in caplog.text


@pytest.mark.parametrize("name", [QUERY_0, "Qformer.bert.encoder.layer.2.crossattention.self.key.weight",
                                  "itm_head.bias", "visual_encoder.ln_pre.weight"])
def test_a_missing_tensor(load, tensors, name):
  del tensors[name]
  refused(load, tensors, f"tensor {name} is missing (1 in all)", "save or download it again")


def test_a_wrong_shape(load, tensors):
  refused(load, tensors | {QUERY_0: torch.zeros(16, 17)},
          f"tensor {QUERY_0} has shape (16, 17), this model needs (16, 16)",
          "make config.stage.model.connector.former agree with the file")


def test_a_wrong_shape_in_several_ways(load, tensors):
  key = "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"
  refused(load, tensors | {key: torch.zeros(17, 1408)}, "make config.stage.model.connector.former agree with the file")
  refused(load, tensors | {"query_tokens": torch.zeros(2)},
          "make config.stage.model.connector.former agree with the file")


def test_a_wider_image_encoder(load, config, make_config):
  wide = q_former(make_config(vision__width=1408))  # ViT-g
  refused(load, wide, "crossattention.self.key.weight has shape (16, 1408), this model needs (16, 16)",
          "use the ViT-L checkpoint, blip2_pretrained_vitL.pth", "config.stage.model.vision.width=1408")
  norm = {name: tensor for name, tensor in wide.items() if name.startswith("ln_vision")}
  refused(load, q_former(config) | norm, "has shape (1408,), this model needs (16,)",
          "config.stage.model.vision.width=1408")


@pytest.mark.parametrize("change, remedy", [
    ({"visual_queries": 3}, "set config.stage.model.connector.former.visual_queries=3"),
    ({"max_positions": 40}, "set config.stage.model.connector.former.max_positions=40"),
    ({"layers": 6}, "set config.stage.model.connector.former.layers=6"),
    ({"cross_attention_frequency": 1}, "set config.stage.model.connector.former.cross_attention_frequency=1"),
])
def test_another_structure(load, make_config, change, remedy):
  other = make_config(**{f"former__{name}": value for name, value in change.items()})
  refused(load, q_former(other), remedy)


def test_a_larger_vocabulary(load, config):
  refused(load, q_former(config, words=100), "set config.stage.model.connector.former.vocab_size to at least 100")


def test_fewer_image_encoder_layers(load, tensors):
  fewer = {name: tensor for name, tensor in tensors.items() if "resblocks.1." not in name}
  refused(load, fewer, "the image encoder has 1 layers (BLIP-2 leaves CLIP's last out)",
          "set config.stage.model.vision.layers=1")


def test_relu_is_refused(load, tensors, make_config):
  refused(load, tensors, "set config.stage.model.connector.former.activation=gelu",
          config=make_config(former__activation="relu"))


def test_a_file_without_q_former(config, tmp_path):
  save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "llama.safetensors")
  with pytest.raises(UserError, match="llama.safetensors: no Q-Former in it; name BLIP-2's weights"):
    blip2.find(tmp_path / "llama.safetensors", config.stage.model, tiny.make_plan(config).shapes)
