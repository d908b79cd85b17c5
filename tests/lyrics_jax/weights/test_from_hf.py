"""`from-hf` writes what a run begins with, bit by bit. What it cannot use is one line, and nothing is written."""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small
import tiny
import torch
from absl import logging as absl_logging
from lavis_layout import image_encoder, q_former, random_clip
from loaded import values_of
from published import llama, save_clip
from safetensors.torch import load_file, save_file
from saved_run import stored

from lyrics_jax.sharding import MeshSettings, make_mesh
from lyrics_jax.weights import blip2
from lyrics_jax.weights import clip_names
from lyrics_jax.weights import llama_names
from lyrics_jax.weights import sources
from lyrics_jax.weights.from_hf import convert
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.initialise import initial_parameters
from refiner_export.common import weight_files
from refiner_export.common.settings import UserError


@pytest.fixture(scope="module")
def make_config():
  def make(stage="instruct", **changes):
    return small.make_config(stage, **({"former__activation": "gelu", "compute__frozen_dtype": "bfloat16"} | changes))
  return make


@pytest.fixture(scope="module")
def published(make_config, tmp_path_factory):
  """CLIP, LLaMA in several shards, and BLIP-2, by kind of source."""
  directory, config = tmp_path_factory.mktemp("published"), make_config()
  save_clip(config, directory / "clip", text=True)
  llama(config).save_pretrained(directory / "llama", max_shard_size="10KB")
  torch.save({"model": q_former(config)}, directory / "blip2.pth")
  return {"clip": str(directory / "clip"), "llama": str(directory / "llama"), "blip2": str(directory / "blip2.pth")}


@pytest.fixture(scope="module")
def converted(make_config, published, tmp_path_factory):
  output = str(tmp_path_factory.mktemp("converted") / "weights")
  convert(make_config(), published, output)
  return output


def expected(config, published) -> dict[str, np.ndarray]:
  """A run's first parameters, with what each source has for it, read whole."""
  plan = tiny.make_plan(config)
  trained, frozen = plan.initialise(tiny.one_device_mesh(config), config.seed)
  values = {path: np.asarray(value) for path, value in plan.turned(trained | frozen).items()}
  for find, kind in ((blip2.find, "blip2"), (llama_names.find, "llama"), (clip_names.find, "clip")):
    for path, value in values_of(find(pathlib.Path(published[kind]), config.stage.model, plan.shapes)).items():
      if value.ndim:
        value = np.concatenate([value.astype(values[path].dtype), values[path][len(value):]])
      values[path] = value
  return values


def first_parameters(config, mesh, output) -> dict[str, np.ndarray]:
  """What a run begins with, as checkpoints have it; and the parameters themselves, by path."""
  plan, checkpoints = tiny.make_plan(config), Checkpoints(str(output))
  trained, frozen = initial_parameters(plan, mesh, checkpoints, sources.find(config.init_from, plan))
  checkpoints.close()
  return plan.turned(trained | frozen), trained | frozen


def assert_same(got, wanted):
  assert set(got) == set(wanted)
  for path, value in wanted.items():
    assert got[path].dtype == value.dtype, path
    if "/" in path and not path.endswith(("lora_a", "queries", "embedding")):
      np.testing.assert_array_equal(got[path], value, err_msg=path)
    else:  # drawn by another program, whose normal values may round differently
      np.testing.assert_allclose(got[path].astype(np.float32), value.astype(np.float32), rtol=1e-5, atol=1e-6,
                                 err_msg=path)


def test_everything_is_loaded_or_initialised(make_config, published, converted):
  assert_same(stored(converted), expected(make_config(), published))
  files = {path.name for path in pathlib.Path(converted).iterdir()}
  assert files == {"config.json", "frozen", "checkpoints"}
  assert os.listdir(pathlib.Path(converted).parent) == ["weights"]  # nothing temporary is left


def test_a_run_begins_with_it(make_config, converted, tmp_path):
  config = make_config(init_from=converted, seed=1)
  got, _ = first_parameters(config, tiny.one_device_mesh(config), tmp_path / "run")
  wanted = stored(converted)
  for path, value in got.items():
    np.testing.assert_array_equal(np.asarray(value), wanted[path], err_msg=path)


def test_a_run_on_eight_devices_begins_with_what_one_device_wrote(make_config, converted, tmp_path):
  config = make_config(init_from=converted, mesh=MeshSettings(2, 2, 2))
  got, parameters = first_parameters(config, make_mesh(config.mesh), tmp_path / "run")
  assert parameters["llm/stack/blocks/up/kernel"].addressable_shards[0].data.shape == (2, 8, 16)
  wanted = stored(converted)
  for path, value in got.items():
    np.testing.assert_array_equal(np.asarray(value), wanted[path], err_msg=path)


def test_on_eight_devices_it_is_the_same(make_config, published, converted, tmp_path):
  config = make_config(mesh=MeshSettings(2, 2, 2))
  convert(config, published, str(tmp_path / "weights"))
  assert_same(stored(tmp_path / "weights"), stored(converted))
  plan, checkpoints = tiny.make_plan(config), Checkpoints(str(tmp_path / "weights"))
  frozen = checkpoints.restore_frozen(plan, plan.shardings(make_mesh(config.mesh), stored=True))
  checkpoints.close()
  assert frozen["llm/stack/blocks/up/kernel"].addressable_shards[0].data.shape == (2, 8, 16)


def test_a_machine_without_the_devices_of_the_run(make_config, published, converted, tmp_path):
  """The weights of a run on sixteen devices; here are eight."""
  convert(make_config(mesh=MeshSettings(-1, 16, 1)), published, str(tmp_path / "weights"))
  assert_same(stored(tmp_path / "weights"), stored(converted))


def test_what_became_of_every_part_is_said_and_int8_is_made_later(make_config, published, tmp_path, caplog):
  absl_logging.use_absl_handler()
  caplog.set_level(logging.INFO, logger="absl")
  convert(make_config(compute__frozen_dtype="int8"), published, str(tmp_path / "weights"))
  clip, former = published["clip"], published["blip2"]
  assert f"left over, {clip}, CLIP's text encoder: " in caplog.text
  heads = "contrastive heads, which here read two pooled vectors: vision_proj (2), text_proj (2)"
  assert f"left over, {former}, {heads}" in caplog.text
  assert f"left over, {former}, heads of stage 1: " in caplog.text
  assert re.search(r"vision +5,344 +0\n", caplog.text) and re.search(r"former/queries    +32 +32\n", caplog.text)
  values = stored(tmp_path / "weights")
  assert values["llm/head/kernel"].dtype == "bfloat16" and not any(path.endswith("_scale") for path in values)


def test_the_first_source_that_has_a_part_gives_it(make_config, published, tmp_path):
  config = make_config("align")
  torch.save({"model": q_former(config) | image_encoder(random_clip(config))}, tmp_path / "blip2.pth")
  save_clip(config, tmp_path / "clip", text=True)  # other numbers
  convert(config, {"clip": str(tmp_path / "clip"), "blip2": str(tmp_path / "blip2.pth")}, str(tmp_path / "both"))
  token = load_file(tmp_path / "clip" / "model.safetensors")["vision_model.embeddings.class_embedding"]
  np.testing.assert_array_equal(stored(tmp_path / "both")["vision/class_token"], token.bfloat16().float())


# --- what is refused ---

QUERY, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"


def change_shard(directory, **tensors) -> None:
  """Puts these tensors into the shard that has the first layer's query; None takes one out. The index follows."""
  index = directory / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  file = values["weight_map"][QUERY]
  changed = load_file(directory / file)
  for name, tensor in tensors.items():
    if tensor is None:
      del changed[name], values["weight_map"][name]
    else:
      changed[name], values["weight_map"][name] = tensor, file
  save_file(changed, directory / file)
  index.write_text(json.dumps(values))


def reindex(directory, **places) -> None:
  """Says of these tensors where they are; None takes one out of the index."""
  index = directory / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  for name, place in places.items():
    values["weight_map"].pop(name)
    if place is not None:
      values["weight_map"][name] = place
  index.write_text(json.dumps(values))


class Dangerous:
  """Unpickled, it would make a directory."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def pickle_code(directory):
  for file in directory.glob("model*"):
    file.unlink()
  torch.save({QUERY: Dangerous(str(directory.parent / "trap"))}, directory / "pytorch_model.bin")


def truncate(directory):
  shard = sorted(directory.glob("*.safetensors"))[0]
  shard.write_bytes(shard.read_bytes()[:-20])


def lose(directory):
  sorted(directory.glob("*.safetensors"))[0].unlink()


def write(file: str, text: str):
  """What writes this text into this file of a directory."""
  return lambda directory: (directory / file).write_text(text)


def changed(how, **arguments):
  """What changes a directory so."""
  return lambda directory: how(directory, **arguments)


FAULTS = {
    "a truncated shard": (truncate, "is not a whole .safetensors file"),
    "a missing shard": (lose, "cannot be read: No such file"),
    "a missing tensor": (changed(change_shard, **{QUERY: None}), f"tensor {QUERY} is missing"),
    "a tensor that the index does not list": (changed(reindex, **{HEAD: None}), "does not list"),
    "an unexpected tensor": (changed(change_shard, **{"model.adapter": torch.zeros(2)}),
                             "unexpected tensor model.adapter"),
    "a wrong shape": (changed(change_shard, **{QUERY: torch.zeros(16, 17)}), "has shape (16, 17)"),
    "an index that leads outside": (changed(reindex, **{QUERY: "../clip/model.safetensors"}),
                                    "nothing outside the directory is read"),
    "an index with a whole path": (changed(reindex, **{QUERY: "/etc/passwd"}),
                                   "nothing outside the directory is read"),
    "an index that is none": (write("model.safetensors.index.json", "{}"), "is not an index of shards"),
    "a pickled file with code in it": (pickle_code, "could only be opened by running code in it"),
    "a damaged config.json": (write("config.json", "{"), "is not JSON"),
    "another model": (write("config.json", '{"num_attention_heads": 4}'), "set config.stage.model.llm.heads=4"),
    "scaled positions": (write("config.json", '{"rope_scaling": {"type": "linear", "factor": 2}}'),
                         "its rotary positions are scaled (linear)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refused(fault, make_config, published, tmp_path):
  shutil.copytree(published["llama"], tmp_path / "llama")
  spoil, words = FAULTS[fault]
  spoil(tmp_path / "llama")
  with pytest.raises(UserError) as error:
    convert(make_config(), published | {"llama": str(tmp_path / "llama")}, str(tmp_path / "weights"))
  message = str(error.value).replace("language_model.", "")
  assert words in message and "\n" not in message, message
  assert os.listdir(tmp_path) == ["llama"]


def test_an_error_while_writing_leaves_nothing(make_config, published, tmp_path, monkeypatch):
  """In the middle of the language model, when the trained parameters are written."""
  real = weight_files.Tensor.read
  def failing(tensor, index=None):
    written = (tmp_path / ".weights.partial").glob("checkpoints/0/parameters/_METADATA")
    if "layers.1.mlp" in tensor.name and any(written):
      raise OSError("No space left on device")
    return real(tensor, index)
  monkeypatch.setattr(weight_files.Tensor, "read", failing)
  with pytest.raises(OSError, match="No space left"):
    convert(make_config(), published, str(tmp_path / "weights"))
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("paths, words", [
    ({}, "nothing to convert: name one or more of --clip, --llama, --blip2"),
    ({"clip": "nowhere"}, "--clip not found: nowhere"),
    ({"clip": None}, "frozen, and no source has it: llm. Add"),
])
def test_sources_that_do_not_suffice(paths, words, make_config, published, tmp_path):
  paths = {kind: path or published[kind] for kind, path in paths.items()}
  with pytest.raises(UserError) as error:
    convert(make_config(), paths, str(tmp_path / "weights"))
  assert words in str(error.value)
  assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(make_config, published, converted):
  with pytest.raises(UserError, match="already exists: remove it, or name another directory"):
    convert(make_config(), published, converted)


CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from lyrics_jax.config import Config
def get_config():
  small = tiny.make_config("align", stage__model__connector__former__activation="gelu")
  return Config(output="unused", stage=small.stage, batch_size=8, data=small.data)
"""


def test_from_the_command_line(make_config, published, tmp_path):
  (tmp_path / "config.py").write_text(CONFIG.format(tests=str(pathlib.Path(tiny.__file__).parent)))

  def run(*arguments):
    return subprocess.run([sys.executable, "-m", "lyrics_jax.convert", *arguments], capture_output=True, text=True,
                          cwd=pathlib.Path(__file__).parents[3], env=os.environ | {"JAX_PLATFORMS": "cpu"})

  done = run("from-hf", f"--config={tmp_path}/config.py", f"--clip={published['clip']}", f"--output={tmp_path}/weights")
  assert done.returncode == 0, done.stderr
  assert "written: " in done.stderr and (tmp_path / "weights" / "config.json").exists()
  refused = run("from-hf", f"--config={tmp_path}/config.py", f"--llama={published['llama']}",
                f"--output={tmp_path}/more")
  assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
  assert refused.stderr.startswith("error: ") and "this model has no language model" in refused.stderr
  assert run("from-pytorch").returncode == 2
