"""Tensors are written while they are read, a piece at a time, and are read back bit by bit."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
import tiny
import torch
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from published import llama, save_bin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lyrics_jax.weights import llama_names
from lyrics_jax.weights import stream
from refiner_export.common import weight_files
from refiner_export.common.weight_files import Tensor, read_tensors

CHUNK = 256  # bytes


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
  """A stack of layers that are larger than a chunk and one of small ones, whole parameters of both kinds, a scalar."""
  rng = np.random.default_rng(0)
  draw = lambda *shape, dtype=np.float32: rng.standard_normal(shape).astype(dtype)
  return {"a/kernel": draw(3, 16, 20, dtype="bfloat16"), "a/scale": draw(3, 4), "b/3/kernel": draw(30, 7),
          "b/thin": draw(65, 2, 3), "b/zeros": np.zeros((4, 8, 8), np.float32), "temperature": draw()}


@pytest.fixture(scope="module")
def written(values, tmp_path_factory):
  """The directory, and what was read of every parameter: (which part, its bytes)."""
  directory, reads = tmp_path_factory.mktemp("stream") / "written", {path: [] for path in values}

  def tensor(path):
    def fetch(index):
      reads[path].append((index, values[path][index].nbytes))
      return values[path][index]
    return Tensor(path, values[path].shape, values[path].dtype, fetch)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stream, "_CHUNK", CHUNK)
    stream.write_checkpoint(epath.Path(directory), {path: tensor(path) for path in values})
  return directory, reads


def test_every_number_is_read_once_and_no_more_than_a_chunk_at_a_time(values, written):
  for path, parts in written[1].items():
    count = np.zeros(values[path].shape, int)
    for index, size in parts:
      count[index] += 1
      assert size <= CHUNK, path
    assert (count == 1).all(), path
  stacks = [index for path in ("a/kernel", "b/thin", "b/zeros") for index, _ in written[1][path]]
  assert all(index[0].stop - index[0].start == 1 for index in stacks)  # a chunk has nothing of two layers
  assert len(written[1]["a/scale"]) == len(written[1]["temperature"]) == 1


def assert_restored(restored, values):
  assert set(restored) == set(values)
  for path, value in values.items():
    assert restored[path].dtype == value.dtype, path
    np.testing.assert_array_equal(np.asarray(restored[path]), value, err_msg=path)


def test_orbax_restores_it_as_it_restores_its_own(values, written, tmp_path):
  with ocp.StandardCheckpointer() as checkpointer:
    assert_restored(checkpointer.restore(written[0]), values)
    checkpointer.save(tmp_path / "own", values)
    checkpointer.wait_until_finished()
    described = [checkpointer.metadata(directory).item_metadata.tree for directory in (written[0], tmp_path / "own")]
    assert described[0].keys() == described[1].keys()
    assert all(type(mine) is type(its) and (mine.shape, mine.dtype) == (its.shape, its.dtype)
               for mine, its in zip(*(tree.values() for tree in described)))


@pytest.mark.parametrize("specs", [
    {}, {"a/kernel": (None, "x", "y"), "b/thin": (None, "x"), "b/zeros": (("x", "y"),)},
    {"a/kernel": (None, ("x", "y")), "b/3/kernel": ("x",), "b/zeros": (None, None, "y")}])
def test_orbax_restores_it_with_any_sharding(specs, values, written):
  mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
  like = {path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(
      mesh, PartitionSpec(*specs.get(path, ())))) for path, value in values.items()}
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(written[0], like)
  assert_restored(restored, values)
  assert all(restored[path].sharding == like[path].sharding for path in values)


def test_an_error_while_reading_leaves_no_checkpoint(tmp_path):
  def fail(index):
    raise OSError("Input/output error")

  with pytest.raises(OSError, match="Input/output error"):
    stream.write_checkpoint(epath.Path(tmp_path / "written"), {"a": Tensor("a", (3,), np.dtype(np.float32), fail)})
  assert not (tmp_path / "written").exists()


# --- what is read of weight files ---

@pytest.fixture(params=["safetensors", "bin"])
def source(request, tmp_path):
  config = small.make_config("instruct", compute__frozen_dtype="bfloat16")
  if request.param == "bin":
    save_bin(llama(config), tmp_path, shards=2)
  else:
    llama(config).save_pretrained(tmp_path, max_shard_size="10KB")
  return llama_names.find(epath.Path(tmp_path), config.stage.model, tiny.make_plan(config).shapes)


@pytest.mark.parametrize("path, index, sizes", [
    ("llm/stack/blocks/q/kernel", np.s_[1:2, 4:12, :], [16 * 8]),  # of one layer, and of that what is asked for
    ("llm/stack/blocks/down/kernel", np.s_[:, 8:16, :], [8 * 16] * 2),
    ("llm/head/kernel", np.s_[:, 10:20], [16 * 10]), ("llm/words/embedding", np.s_[40:48, :], [8 * 16])])
def test_a_part_is_read_by_itself(path, index, sizes, source, monkeypatch):
  reads = []
  real = weight_files.Tensor.read

  def counted(tensor, index=None):
    value = real(tensor, index)
    reads.append(value.size)
    return value

  monkeypatch.setattr(weight_files.Tensor, "read", counted)
  whole = source.read(path)
  reads.clear()
  tensor = source.tensor(path, np.dtype("bfloat16"))
  part = tensor.fetch(index)
  assert reads == sizes and tensor.shape == whole.shape
  assert part.dtype == tensor.dtype == "bfloat16"
  np.testing.assert_array_equal(part, whole.astype("bfloat16")[index])


# --- .safetensors ---

def test_safetensors_are_copied(tmp_path):
  tensors = {"d": torch.tensor([True, False, True]), "a": torch.arange(6.).reshape(2, 3).bfloat16(),
             "b": torch.tensor(0.5), "c": torch.arange(5), "e": torch.arange(6, dtype=torch.float64).reshape(3, 2)}
  save_file(tensors, tmp_path / "one.safetensors")
  folder = epath.Path(tmp_path)
  stream.write_safetensors(folder / "two.safetensors", read_tensors(folder / "one.safetensors"))
  copied = load_file(tmp_path / "two.safetensors")
  assert copied.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert copied[name].dtype == tensor.dtype and torch.equal(copied[name], tensor), name
  with safe_open(tmp_path / "two.safetensors", "pt") as file:
    assert file.metadata() == {"format": "pt"}  # without it transformers refuses a file


def test_tensors_of_a_safetensors_file_are_aligned(tmp_path):
  """In whatever order they come; readers map numbers as they lie there."""
  tensor = lambda name, dtype, *shape: Tensor(name, shape, np.dtype(dtype), np.ones(shape, dtype).__getitem__)
  tensors = [tensor("a", "bool", 3), tensor("b", "int64", 1), tensor("c", "bfloat16", 5), tensor("d", "float32", 1, 3)]
  stream.write_safetensors(epath.Path(tmp_path / "a.safetensors"), {each.name: each for each in tensors})
  content = (tmp_path / "a.safetensors").read_bytes()
  size = int.from_bytes(content[:8], "little")
  header = json.loads(content[8:8 + size])
  starts = {name: (8 + size + entry["data_offsets"][0]) for name, entry in header.items() if name != "__metadata__"}
  assert all(starts[each.name] % each.dtype.itemsize == 0 for each in tensors)
  assert load_file(tmp_path / "a.safetensors").keys() == {"a", "b", "c", "d"}


def test_a_type_that_numpy_lacks(tmp_path):
  save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
  with pytest.raises(Exception, match="tensor a is of type F8_E4M3, which cannot be read here. Save it in float32"):
    read_tensors(epath.Path(tmp_path / "a.safetensors"))


def test_a_bin_index_is_checked_too(tmp_path):
  save_bin(llama(small.make_config("instruct")), tmp_path, shards=2)
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
  with pytest.raises(Exception, match="nothing outside the directory is read"):
    read_tensors(epath.Path(tmp_path))
