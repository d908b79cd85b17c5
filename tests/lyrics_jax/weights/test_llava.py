"""LLaVA-1.5 as a value: its logits and its loss are those of transformers, in both directions."""

import json

import jax
import numpy as np
import pytest
import small
import tiny
import torch
import transformers
from flax import nnx
from lavis_layout import with_noise
from loaded import built, values_of
from PIL import Image
from safetensors.torch import load_file, save_file
from saved_run import make_run_config, save_run

from lyrics_jax.data.templates import VicunaV1
from lyrics_jax.data.views import View
from lyrics_jax.inference.generator import Generator
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD
from lyrics_jax.weights import sources
from lyrics_jax.weights.check import compare
from lyrics_jax.weights.formats import format_of
from lyrics_jax.weights.from_hf import convert
from lyrics_jax.weights.llava_names import UNREAD
from lyrics_jax.weights.to_hf import export
from refiner_export.common.settings import UserError

TOLERANCE = 1e-4  # float32 in both, summed in another order
ADDED = 16  # rows of word embedding and head behind ours: the image token and its neighbours


@pytest.fixture(scope="module")
def config():
  return small.make_config("llava", vision__layers=2)


@pytest.fixture(scope="module")
def theirs(config) -> transformers.LlavaForConditionalGeneration:
  """With one block more than is read, as in LLaVA-1.5: the output of the last block but one goes to the connector."""
  vision, llm = config.stage.model.vision, config.stage.model.llm
  model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
      vision_config=dict(model_type="clip_vision_model", hidden_size=vision.width, intermediate_size=vision.mlp_dim,
                         num_hidden_layers=vision.layers + 1, num_attention_heads=vision.heads,
                         image_size=vision.image_size, patch_size=vision.patch_size, hidden_act="quick_gelu"),
      text_config=dict(model_type="llama", vocab_size=llm.vocab_size + ADDED, hidden_size=llm.width,
                       num_hidden_layers=llm.layers, num_attention_heads=llm.heads, intermediate_size=llm.mlp_dim,
                       num_key_value_heads=llm.kv_heads, rms_norm_eps=llm.norm_eps),
      image_token_index=llm.vocab_size, vision_feature_layer=-2, vision_feature_select_strategy="default"))
  return with_noise(model.eval())


def save(model, directory, naming: str) -> str:
  """As the installed transformers writes it, as its classes name the tensors, or as the published files do."""
  model.save_pretrained(directory, max_shard_size="10KB" if naming == "shards" else "1GB")
  if naming == "classes":
    save_file(model.state_dict(), directory / "model.safetensors")
  elif naming == "published":
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
      bare = name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model.")
      tensors[name.replace("vision_tower.", "vision_tower.vision_model.") if bare else name] = tensor
    save_file(tensors, directory / "model.safetensors")
  return str(directory)


def torch_batch(form, batch) -> dict[str, torch.Tensor]:
  """The inputs of transformers' class, with labels at the targets."""
  given = form.torch_inputs({name: batch[name] for name in form.fields()})
  ids, valid = given["ids"], given["segments"] > 0
  return {"input_ids": ids.masked_fill(given["slot"] >= 0, tiny.VOCABULARY), "attention_mask": valid.long(),
          "pixel_values": given["pixel_values"], "labels": torch.where(torch.tensor(batch["targets"]), ids, -100)}


@pytest.mark.parametrize("naming", ["saved", "shards", "classes", "published"])
def test_logits_and_loss_are_equal(naming, config, theirs, tmp_path):
  plan, form = tiny.make_plan(config), format_of(config)
  origin = sources.find(save(theirs, tmp_path / "llava", naming), plan)
  assert set(origin.paths()) == set(plan.shapes)
  assert set(origin.left_over) == {UNREAD, "CLIP's final norm, whose result is not read"}
  assert len(origin.left_over[UNREAD]) == 16

  batch = tiny.make_batch(config, rows=3)
  graph, state = built(lambda: config.stage.build(config.compute, nnx.Rngs(0)), values_of(origin), "")

  @jax.jit
  def ours(state, batch):
    model = nnx.merge(graph, state)
    return form.jax_outputs(model, batch), config.stage.loss(model, batch).value

  outputs, loss = jax.device_get(ours(state, batch))
  given = torch_batch(form, batch)
  labels = given.pop("labels")
  with torch.no_grad():
    made = theirs(**given)
    # The published loss is over all rows of the head, ours over those that words have.
    logits = made.logits[..., :config.stage.model.llm.vocab_size]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
  logits = logits * given["attention_mask"][..., None]
  difference = np.abs(outputs["llm logits"] - logits.numpy()).max()
  print(f"largest difference: {difference:.1e}")
  assert difference < TOLERANCE and np.ptp(outputs["llm logits"]) > 1
  assert loss == pytest.approx(expected.item(), abs=TOLERANCE)


def test_the_whole_vocabulary_gives_the_published_loss(theirs, tmp_path):
  """With as many words as the file has rows, nothing is left out, and transformers' own loss is ours."""
  config = small.make_config("llava", llm__vocab_size=tiny.VOCABULARY + ADDED)
  plan, form = tiny.make_plan(config), format_of(config)
  origin = sources.find(save(theirs, tmp_path / "llava", "saved"), plan)
  batch = tiny.make_batch(config, rows=3)
  graph, state = built(lambda: config.stage.build(config.compute, nnx.Rngs(0)), values_of(origin), "")
  loss = jax.jit(lambda state, batch: config.stage.loss(nnx.merge(graph, state), batch).value)(state, batch)
  with torch.no_grad():
    expected = theirs(**torch_batch(form, batch)).loss
  assert loss == pytest.approx(expected.item(), abs=TOLERANCE)


@pytest.mark.parametrize("change, words", [
    ({"vision__layers": 3}, "the output of block 2 of 3 is read, config.stage.model.vision.layers=3; set "),
    ({"vision__class_token": "keep"}, "set config.stage.model.vision.class_token=drop"),
    ({"vision__heads": 4}, "set config.stage.model.vision.heads=2"),
    ({"llm__width": 32}, "set config.stage.model.llm.width=16"),
])
def test_another_configuration(change, words, theirs, tmp_path):
  plan = tiny.make_plan(small.make_config("llava", **change))
  with pytest.raises(UserError) as error:
    sources.find(save(theirs, tmp_path / "llava", "saved"), plan)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_model_with_another_connector(theirs, tmp_path):
  plan = tiny.make_plan(small.make_config("instruct"))
  with pytest.raises(UserError, match="its connector is an MLP; set config.stage.model to a VLMSettings with"):
    sources.find(save(theirs, tmp_path / "llava", "saved"), plan)


# --- the other way ---

@pytest.fixture(scope="module")
def exported(tokenizer_directory, tmp_path_factory):
  """A run of LLaVA's form with LoRA, its parameters, and the directory made of it."""
  folder = tmp_path_factory.mktemp("llava")
  config = make_run_config("llava", folder / "run", tokenizer_directory, llm__lora=tiny.llm().lora,
                           stage__train=tiny.LORA, data__fit="crop",
                           data__rows__template=VicunaV1(system_message="A chat."))
  parameters = save_run(config)
  export(config.output, str(folder / "hf"))
  return config, parameters, folder / "hf"


def test_check(exported):
  config, _, directory = exported
  differences = compare(config.output, str(directory))
  assert list(differences) == ["vision", "connector", "llm logits"]
  assert max(differences.values()) < TOLERANCE


def test_nothing_is_missing(exported):
  _, _, directory = exported
  _, loading = transformers.LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
  assert not any(loading.values()), loading
  files = {path.name for path in directory.iterdir()}
  assert files == {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
                   "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
                   "training"}
  card = (directory / "README.md").read_text()
  assert "LlavaForConditionalGeneration.from_pretrained(directory)" in card and "LoRA merged" in card


def test_it_comes_back_bit_by_bit(exported, tmp_path):
  """Of what LoRA was not added to."""
  config, parameters, directory = exported
  origin = sources.find(str(directory), tiny.make_plan(config))
  assert {path for path in parameters if path not in origin.paths()} == {path for path in parameters if "lora_" in path}
  for path in origin.paths():
    if not path.endswith(("/q/kernel", "/v/kernel")):
      np.testing.assert_array_equal(origin.read(path), parameters[path], err_msg=path)
  convert(config, {"llava": str(directory)}, str(tmp_path / "weights"))
  assert json.loads((tmp_path / "weights" / "config.json").read_text())["stage"]["model"]


def places_of(config, expected) -> np.ndarray:
  """The ids of an example of ours, with the image token at the places of the picture."""
  ids = np.where(expected["slot"] >= 0, config.stage.model.llm.vocab_size, expected["ids"])
  return ids[expected["segments"] > 0]


def test_conversations_as_in_training(exported, records):
  """Question, answer and question, by the chat template."""
  config, _, directory = exported
  processor = transformers.AutoProcessor.from_pretrained(directory)
  texts = ["What is this?", "A cat.", "Where is it?"]
  messages = []
  for role, text in zip(("user", "assistant", "user"), texts):
    picture = [] if messages else [{"type": "image"}]
    messages.append({"role": role, "content": [*picture, {"type": "text", "text": text}]})
  prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
  examples = config.data.rows.examples(config.data, config.fields, config.dimensions, config.stage.objectives)
  expected = examples.prompt(records[0], texts)
  batch = processor(images=Image.fromarray(expected["image"][0]), text=prompt, return_tensors="pt")
  np.testing.assert_array_equal(batch["input_ids"][0], places_of(config, expected))


def test_the_same_answers(exported, records):
  """Prompts by the chat template, pictures by the processor, greedy texts."""
  config, _, directory = exported
  processor = transformers.AutoProcessor.from_pretrained(directory)
  model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
  assert type(processor).__name__ == "LlavaProcessor"
  questions = ["What is this?", "Where is the red ball?"]
  answers = Generator(LoadedModel.open(config.output), 2, 8).answer([(records[0], text) for text in questions])
  examples = config.data.rows.examples(config.data, config.fields, config.dimensions, config.stage.objectives)
  for question, answer in zip(questions, answers):
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    expected = examples.prompt(records[0], [question])
    picture = Image.fromarray(expected["image"][0])
    batch = processor(images=picture, text=prompt, return_tensors="pt")
    np.testing.assert_array_equal(batch["input_ids"][0], places_of(config, expected))
    generated = model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1]:]
    assert processor.batch_decode(generated, skip_special_tokens=True)[0].strip() == answer


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_pictures_are_made_alike(fit, records, tokenizer_directory, tmp_path):
  """As in training, within a few grey levels: transformers resizes in another order."""
  config = make_run_config("llava", tmp_path / "run", tokenizer_directory, data__fit=fit, vision__image_size=56)
  format_of(config).write_files(tmp_path)
  processor = transformers.AutoProcessor.from_pretrained(tmp_path)
  rng = np.random.default_rng(0)
  smooth = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize((150, 100), Image.Resampling.BICUBIC)
  expected = View().fitted(fit, 150, 100).image(np.asarray(smooth), 56)
  pixels = processor(images=smooth, text="<image>", return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()
  got = (pixels * PIXEL_STD + PIXEL_MEAN) * 255
  assert got.shape == expected.shape
  assert np.abs(got - expected).mean() < 2


def test_what_cannot_be_written(exported, tmp_path):
  config, _, _ = exported
  with pytest.raises(UserError, match="cannot be loaded without its language model: use --lora=merge"):
    export(config.output, str(tmp_path / "out"), lora="adapter")
  assert not (tmp_path / "out").exists()
