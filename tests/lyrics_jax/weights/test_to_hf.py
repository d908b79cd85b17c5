"""What an exported directory holds, that nothing of the weights is lost, and that it works where there is no JAX."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from published import trained_llama
from safetensors.numpy import load_file
from saved_run import MANIFEST, make_run_config, save_run

from lyrics_jax.config import Config
from lyrics_jax.data.tokenizers import load_llm_tokenizer, load_mq_former_tokenizer
from lyrics_jax.inference.generator import Generator
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.weights import lyrics_names
from lyrics_jax.weights import to_hf
from lyrics_jax.torch_model.modeling_lyrics import LyricsForConditionalGeneration
from lyrics_jax.torch_model.processing_lyrics import LyricsProcessor, RefinerFeatures
from lyrics_jax.weights.to_hf import export
from lyrics_jax.models.layers.int8 import SCALE, dequantise
from lyrics_jax.weights.llama_names import adapter_entries, is_lora
from refiner_export.records.manifest import Manifest
from refiner_export.common.settings import UserError, from_dict
from refiner_export.common.weight_files import read_tensors

PROMPTS = ["What is this?", "Where is the red ball?", "How many cats are in this picture, and what do they do?", "Hi"]
NEW = 12  # tokens of an answer


@dataclasses.dataclass
class Exported:
  """A run of stage 2 with LoRA, exported in both ways, and one of stage 1 with frozen parameters in bfloat16."""
  config: Config
  parameters: dict[str, np.ndarray]
  merged: pathlib.Path
  adapter: pathlib.Path
  align_config: Config
  align_parameters: dict[str, np.ndarray]
  align: pathlib.Path


@pytest.fixture(scope="module")
def exported(tokenizer_directory, tmp_path_factory) -> Exported:
  folder = tmp_path_factory.mktemp("exported")
  config = make_run_config("instruct", folder / "run", tokenizer_directory, data__rows__spatial_to_llm=True)
  align = make_run_config("align", folder / "align_run", tokenizer_directory, compute__frozen_dtype="bfloat16")
  result = Exported(config, save_run(config), folder / "merged", folder / "adapter", align, save_run(align),
                    folder / "align")
  export(config.output, str(result.merged))
  export(config.output, str(result.adapter), lora="adapter")
  export(align.output, str(result.align))
  return result


def read_back(directory, config) -> dict[str, np.ndarray]:
  """Our parameters, from the files of the model itself."""
  entries = lyrics_names.entries(config.stage.model, tiny.make_plan(config).shapes)
  tensors = read_tensors(directory)
  inside = {path: entry for path, entry in entries.items() if entry.names[0] in tensors}
  assert sorted(name for entry in inside.values() for name in entry.names) == sorted(tensors)
  return {path: entry.read(tensors) for path, entry in inside.items()}


def assert_identical(got, parameters, paths):
  for path in paths:
    assert got[path].dtype == parameters[path].dtype, path
    np.testing.assert_array_equal(got[path], parameters[path], err_msg=path)


def test_stage_1_comes_back_bit_by_bit(exported):
  got = read_back(exported.align, exported.align_config)
  assert got.keys() == exported.align_parameters.keys()
  assert_identical(got, exported.align_parameters, got)
  assert {str(value.dtype) for value in got.values()} == {"float32", "bfloat16"}


def test_stage_2_comes_back_bit_by_bit_with_its_adapter(exported):
  ours = exported.parameters
  apart, merged = read_back(exported.adapter, exported.config), read_back(exported.merged, exported.config)
  assert_identical(apart, ours, [path for path in ours if not path.startswith("llm/")])
  changed = [f"llm/stack/blocks/{name}/kernel" for name in "qv"]
  assert_identical(merged, ours, [path for path in ours if path not in changed and not is_lora(path)])
  shapes = tiny.make_plan(exported.config).shapes
  adapter = read_tensors(exported.adapter / "adapter" / "adapter_model.safetensors")
  entries = adapter_entries(shapes)
  assert entries.keys() == set(filter(is_lora, ours))
  assert_identical({path: entry.read(adapter) for path, entry in entries.items()}, ours, entries)
  scale = exported.config.stage.model.llm.lora.alpha / exported.config.stage.model.llm.lora.rank
  for path in changed:
    a, b = (ours[path.replace("kernel", leaf)] for leaf in ("lora_a", "lora_b"))
    np.testing.assert_allclose(merged[path], ours[path] + scale * (a @ b), atol=1e-5)


def test_int8_is_written_out(tokenizer_directory, tmp_path):
  config = make_run_config("instruct", tmp_path / "run", tokenizer_directory, compute__frozen_dtype="int8")
  ours = save_run(config)
  export(config.output, str(tmp_path / "merged"))
  tensors = read_tensors(tmp_path / "merged")
  assert not any("scale" in name for name in tensors)
  lora = config.stage.model.llm.lora

  def kernel(module):
    """Of layer 1."""
    return dequantise(ours[f"{module}/kernel"][1], ours[f"{module}/kernel{SCALE}"][1])

  q = "llm/stack/blocks/q"
  added = lora.alpha / lora.rank * ours[f"{q}/lora_a"][1] @ ours[f"{q}/lora_b"][1]
  for name, expected in (("vision_model.encoder.layers.1.mlp.fc1", kernel("vision/stack/blocks/up").T),
                         ("language_model.model.layers.1.self_attn.q_proj", (kernel(q) + added).T)):
    got = tensors[f"{name}.weight"].read()
    assert got.dtype == "bfloat16"
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2**-8)  # bfloat16 keeps 8 bits


def test_the_files(exported):
  names = lambda directory: {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
  shared = {"README.md", "config.json", "configuration_lyrics.py", "model.safetensors", "modeling_lyrics.py",
            "mq_former_tokenizer/tokenizer.json", "mq_former_tokenizer/tokenizer_config.json", "processing_lyrics.py",
            "processor_config.json", "training/config.json", "training/manifest.json"}
  spoken = shared | {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
  assert names(exported.align) == shared and names(exported.merged) == spoken
  assert names(exported.adapter) == spoken | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
  for directory, config in ((exported.merged, exported.config), (exported.align, exported.align_config)):
    saved = json.loads((directory / "training/config.json").read_text())
    assert from_dict(Config, saved) == config
    assert Manifest.load(directory / "training") == MANIFEST
  card = (exported.merged / "README.md").read_text()
  assert card.startswith("---\nlibrary_name: transformers\n") and "license: other" in card
  for said in (MANIFEST.fingerprint, "pip install torch transformers pillow\n", "trust_remote_code=True",
               '"spatial_to_llm": true', "LoRA merged", "made-up"):
    assert said in card, said
  adapter = (exported.adapter / "README.md").read_text()
  assert "PeftModel.from_pretrained" in adapter and "pip install torch transformers pillow peft\n" in adapter
  assert "PeftModel" not in card
  assert "outputs.itm_logits" in (exported.align / "README.md").read_text()


def test_tokenizers_are_those_of_training(exported):
  data = exported.config.data
  ours = load_llm_tokenizer(data.llm_tokenizer), load_mq_former_tokenizer(data.mq_former_tokenizer)
  for tokenizer, directory in zip(ours, (exported.merged, exported.merged / "mq_former_tokenizer")):
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in ("\nWhere is the café table? ASSISTANT:", "<br><T> cat </T><Bbox> (0.125,0.0),(1.000,0.5)", " a  b"):
      assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_shards_hold_the_same(exported, tmp_path, monkeypatch):
  monkeypatch.setattr(to_hf, "SHARD_BYTES", 40_000)
  export(exported.align_config.output, str(tmp_path / "shards"))
  index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
  files = sorted(set(index["weight_map"].values()))
  assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
  whole = load_file(exported.align / "model.safetensors")
  parts = [load_file(tmp_path / "shards" / file) for file in files]
  assert all(len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 40_000 for part in parts)
  shards = {name: tensor for part in parts for name, tensor in part.items()}
  assert shards.keys() == whole.keys() == index["weight_map"].keys()
  assert all(np.array_equal(shards[name], whole[name]) for name in whole)
  assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


# What a user writes, where nothing of what this project is made with is installed.
ALONE = """
import importlib.util, json, sys
names = "jax", "jaxlib", "flax", "orbax", "optax", "peft", "accelerate", "lyrics_jax", "refiner_export", "PIL"
assert [name for name in names if importlib.util.find_spec(name)] == []
import numpy as np, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
directory, inputs, new = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
RefinerFeatures = sys.modules[type(processor).__module__].RefinerFeatures
features = RefinerFeatures(**{name: inputs[name] for name in inputs.files if name != "image"})
prompts, image = json.loads(sys.argv[4]), inputs["image"]
batch = processor(images=image, text=prompts, refined=features)
generated = model.generate(**batch, max_new_tokens=new)
alone = [processor.answers(model.generate(**one, max_new_tokens=new), one["input_ids"])[0]
         for one in (processor(images=image, text=prompt, refined=features) for prompt in prompts)]
others = [kind.from_pretrained(directory, trust_remote_code=True)
          for kind in (AutoModelForCausalLM, AutoModelForImageTextToText)]
pairs = AutoProcessor.from_pretrained(sys.argv[5], trust_remote_code=True)(
    images=image, text=prompts, refined=features)
aligned = AutoModel.from_pretrained(sys.argv[5], trust_remote_code=True, dtype=torch.float32).eval()
try:
  processor(images=image[1:], text=prompts)
except ImportError as error:
  refusal = str(error)
print(json.dumps({"refusal": refusal, "batch": processor.answers(generated, batch["input_ids"]), "alone": alone,
                  "classes": [type(each).__name__ for each in (processor, model, *others, aligned)],
                  "similarities": aligned(**pairs).logits_per_image.shape}))
"""


def run_alone(python, directory, align, picture, size, tmp_path) -> dict:
  """What `ALONE` prints; -I keeps out PYTHONPATH, the working directory and the user's own site directory.

  The picture is resized here.
  """
  features = RefinerFeatures(tags=picture.tags, boxes=picture.boxes, mask_features=picture.mask_features,
                             detection_features=picture.detection_features, detection_boxes=picture.detection_boxes,
                             text_boxes=picture.text_boxes)
  image = Image.open(io.BytesIO(picture.image)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
  np.savez(tmp_path / "inputs.npz", image=np.asarray(image), **vars(features))
  environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
  line = [str(python), "-I", "-c", ALONE, str(directory), str(tmp_path / "inputs.npz"), str(NEW), json.dumps(PROMPTS),
          str(align)]
  process = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
  assert process.returncode == 0, process.stderr[-3000:]
  return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(exported, records) -> list[str]:
  generator = Generator(LoadedModel.open(exported.config.output), len(PROMPTS), NEW)
  return generator.answer([(records[0], prompt) for prompt in PROMPTS])


def test_the_same_answers_where_there_is_no_jax(exported, records, answers, python_alone, tmp_path):
  """Greedy texts of prompts of different lengths, in one batch and one by one, in an environment of their own."""
  assert len(set(answers)) > 1 and all(answers)
  size = exported.config.stage.model.vision.image_size
  got = run_alone(python_alone, exported.merged, exported.align, records[0].picture, size, tmp_path)
  assert got.pop("refusal") == ("images: Pillow is needed to decode and resize pictures: pip install pillow. Without "
                                f"it, give uint8 arrays of shape ({size}, {size}, 3)")
  assert got == {"batch": answers, "alone": answers, "similarities": [len(PROMPTS)] * 2, "classes": [
      "LyricsProcessor", *["LyricsForConditionalGeneration"] * 3, "LyricsForAlignment"]}


def test_the_adapter_on_ones_own_llama(exported, records, answers, tmp_path):
  """LLaMA as transformers saves it, PEFT's own loading, the rest from the directory."""
  peft = pytest.importorskip("peft")
  trained_llama(exported.config, exported.parameters).save_pretrained(tmp_path / "llama")
  llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
  model = LyricsForConditionalGeneration.from_pretrained(exported.adapter, dtype=torch.float32).eval()
  processor = LyricsProcessor.from_pretrained(exported.adapter)
  batch = processor(text=PROMPTS, refined=records[0].picture)
  with pytest.raises(ValueError, match="holds no LLaMA: set model.language_model"):
    model(**batch)
  model.language_model = peft.PeftModel.from_pretrained(llama, exported.adapter / "adapter").eval()
  assert processor.answers(model.generate(**batch, max_new_tokens=NEW), batch["input_ids"]) == answers


@pytest.mark.parametrize("settings", [dict(num_beams=3), dict(do_sample=True, top_k=5), dict(use_cache=False),
                                      dict(num_beams=2, num_return_sequences=2)], ids=str)
def test_every_way_of_generating(exported, records, settings):
  model = LyricsForConditionalGeneration.from_pretrained(exported.merged).eval()
  processor = LyricsProcessor.from_pretrained(exported.merged)
  batch = processor(text=PROMPTS[:2], refined=records[1].picture)
  torch.manual_seed(0)
  generated = model.generate(**batch, max_new_tokens=5, **settings)
  length = batch["input_ids"].shape[1]
  assert len(generated) == 2 * settings.get("num_return_sequences", 1) and generated.shape[1] <= length + 5
  if "use_cache" in settings:
    assert torch.equal(generated, model.generate(**batch, max_new_tokens=5))
  if settings.get("num_beams") == 3:
    # Beam search finds nothing less probable than the greedy answer, here where no answer ends early.
    score = lambda sequences: score_of(model, batch, sequences)
    assert (score(generated) >= score(model.generate(**batch, max_new_tokens=5)) - 1e-4).all()


@torch.no_grad()
def score_of(model, batch, sequences) -> torch.Tensor:
  """Log-probability of what follows the prompts."""
  length = batch["input_ids"].shape[1]
  inputs = dict(batch) | {"input_ids": sequences, "attention_mask": torch.nn.functional.pad(
      batch["attention_mask"], (0, sequences.shape[1] - length), value=1)}
  scores = model(**inputs).logits.log_softmax(-1)[:, length - 1:-1]
  return scores.gather(-1, sequences[:, length:, None])[..., 0].sum(1)


def test_devices_are_chosen(exported, records):
  """`device_map` places whole layers, so that the parts of a picture's way may lie on different devices."""
  pytest.importorskip("accelerate")
  model = LyricsForConditionalGeneration.from_pretrained(exported.merged, device_map="auto")
  processor = LyricsProcessor.from_pretrained(exported.merged)
  batch = processor(text=PROMPTS[:2], refined=records[1].picture).to(model.device)
  plain = LyricsForConditionalGeneration.from_pretrained(exported.merged)
  generated = model.generate(**batch, max_new_tokens=5).cpu()
  assert torch.equal(generated, plain.generate(**batch.to("cpu"), max_new_tokens=5))


def test_bfloat16_and_saving_again(exported, records, tmp_path):
  model = LyricsForConditionalGeneration.from_pretrained(exported.merged, dtype=torch.bfloat16).eval()
  assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
  processor = LyricsProcessor.from_pretrained(exported.merged)
  batch = processor(text="What?", refined=records[0].picture)
  logits = model(**batch).logits
  model.save_pretrained(tmp_path)
  processor.save_pretrained(tmp_path)
  again = LyricsForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
  repeated = LyricsProcessor.from_pretrained(tmp_path)(text="What?", refined=records[0].picture)
  assert all(torch.equal(batch[name], repeated[name]) for name in batch)
  assert torch.equal(again(**repeated).logits, logits)


def test_weights_that_were_not_trained_here(exported, tmp_path):
  """Converted ones have no records and no manifest."""
  converted = shutil.copytree(exported.align_config.output, tmp_path / "converted")
  (converted / "manifest.json").unlink()
  export(str(converted), str(tmp_path / "out"))
  assert [path.name for path in (tmp_path / "out/training").iterdir()] == ["config.json"]
  assert "These weights were converted, not trained here." in (tmp_path / "out/README.md").read_text()


def test_mistakes(exported, tmp_path):
  with pytest.raises(UserError, match="merged already exists: remove it, or name another directory"):
    export(exported.config.output, str(exported.merged))
  with pytest.raises(UserError, match="align_run has no LoRA, so there is no adapter"):
    export(exported.align_config.output, str(tmp_path / "out"), lora="adapter")
  with pytest.raises(UserError, match="run not found: /nowhere"):
    export("/nowhere", str(tmp_path / "out"))
  gone = shutil.copytree(exported.align_config.output, tmp_path / "gone")
  config = json.loads((gone / "config.json").read_text())
  config["data"]["mq_former_tokenizer"] = "/nowhere"
  (gone / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="no such directory: /nowhere"):
    export(str(gone), str(tmp_path / "out"))
  assert [path.name for path in tmp_path.iterdir()] == ["gone"]  # nothing half-made is left
