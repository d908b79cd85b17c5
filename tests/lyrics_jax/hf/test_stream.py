"""Every device's slice of a parameter is read on its own, and only it; written parameters are read back bit by bit."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
import torch
from etils import epath
from published import llama, save_bin
from safetensors.torch import load_file, save_file

from lyrics_jax.config import MeshConfig
from lyrics_jax.hf import llama_names, read, stream
from lyrics_jax.hf.read import read_tensors
from lyrics_jax.training.sharding import make_mesh


@pytest.fixture(scope="module")
def config():
  return tiny.make_config("instruct", mesh=MeshConfig(2, 2, 2), model__frozen_dtype="bfloat16")


@pytest.fixture(scope="module")
def plan(config):
  return tiny.make_plan(config)


@pytest.fixture(params=["safetensors", "bin"])
def source(request, config, plan, tmp_path):
  if request.param == "bin":
    save_bin(llama(config), tmp_path, shards=2)
  else:
    llama(config).save_pretrained(tmp_path, max_shard_size="10KB")
  return llama_names.find(epath.Path(tmp_path), config.model, plan.shapes)


def test_each_device_reads_only_its_slice(source, plan, config, monkeypatch):
  reads = []
  real = read.Tensor.read

  def counted(tensor, index=None):
    value = real(tensor, index)
    reads.append((tensor.name, value.size))
    return value

  monkeypatch.setattr(read.Tensor, "read", counted)
  mesh = make_mesh(config.mesh)
  shardings = plan.shardings(mesh)
  # width over fsdp, heads or MLP over tensor: a device has a quarter of a kernel, and reads it layer by layer
  for path, part in {"llm/stack/blocks/q/kernel": (2, 8, 8), "llm/stack/blocks/down/kernel": (2, 16, 8),
                     "llm/head/kernel": (8, 24), "llm/words/embedding": (24, 8), "llm/norm/scale": (16,)}.items():
    reads.clear()
    value = stream.place(source, path, plan.shapes[path], shardings[path])
    assert value.addressable_shards[0].data.shape == part
    layers, size = (part[0], np.prod(part[1:])) if "stack" in path else (1, np.prod(part))
    assert {each for _, each in reads} == {size}, path
    distinct = len({str(shard.index) for shard in value.addressable_shards})
    assert len(reads) in (8 * layers, distinct * layers)  # JAX may ask once for devices that hold the same
    assert value.dtype == "bfloat16"
    np.testing.assert_array_equal(np.asarray(value), source.read(path).astype("bfloat16"), err_msg=path)


def test_groups_are_in_order_and_a_large_one_is_alone(monkeypatch):
  monkeypatch.setattr(stream, "_GROUP", 40)
  shapes = {name: jax.ShapeDtypeStruct((size,), "float32") for name, size in
            {"a": 4, "b": 5, "c": 2, "d": 100, "e": 1}.items()}
  assert list(stream.groups(shapes)) == [["a", "b"], ["c"], ["d"], ["e"]]
  assert list(stream.groups({})) == []


def test_written_in_parts_and_read_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(stream, "_GROUP", 64)
  rng = np.random.default_rng(0)
  values = {"a/kernel": rng.standard_normal((3, 4, 5)).astype("bfloat16"), "a/scale": rng.standard_normal(4).astype(np.float32),
            "b/3/kernel": rng.standard_normal((6, 7)).astype(np.float32), "temperature": np.float32(0.07)}
  shapes = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in values.items()}
  made = []
  stream.write_all(epath.Path(tmp_path / "written"), shapes, lambda path: made.append(path) or jax.device_put(values[path]))
  assert made == list(values)
  assert [path.name for path in tmp_path.iterdir()] == ["written"]
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "written")
  assert set(restored) == set(values)
  for path, value in values.items():
    assert restored[path].dtype == value.dtype
    np.testing.assert_array_equal(np.asarray(restored[path]), value, err_msg=path)


def test_safetensors_are_copied(tmp_path):
  tensors = {"a": torch.arange(6.).reshape(2, 3).bfloat16(), "b": torch.tensor(0.5), "c": torch.arange(5)}
  save_file(tensors, tmp_path / "one.safetensors")
  stream.write_safetensors(epath.Path(tmp_path / "two.safetensors"), read_tensors(epath.Path(tmp_path / "one.safetensors")))
  copied = load_file(tmp_path / "two.safetensors")
  assert {name: tensor.dtype for name, tensor in copied.items()} == {name: tensor.dtype for name, tensor in tensors.items()}
  for name, tensor in tensors.items():
    assert torch.equal(copied[name], tensor), name


def test_a_bin_index_is_checked_too(config, tmp_path):
  save_bin(llama(config), tmp_path, shards=2)
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
  with pytest.raises(Exception, match="nothing outside the directory is read"):
    read_tensors(epath.Path(tmp_path))
