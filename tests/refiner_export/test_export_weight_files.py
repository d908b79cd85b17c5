"""Weight files of every form are read safely, whole or in parts. Broken or dangerous files give one clear line."""

import argparse
import builtins
import hashlib
import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.torch import save_file

from refiner_export.common import files
from refiner_export.common import weight_files
from refiner_export.common.settings import UserError
from refiner_export.common.weight_files import holds_weights, load_state_dict, read_tensors, sha256

TENSORS = {"a": torch.arange(6.).reshape(2, 3), "b": torch.tensor(0.5), "c": torch.ones(4, dtype=torch.bfloat16)}
STATE = {"layer.weight": torch.arange(6.).reshape(2, 3), "layer.bias": torch.ones(2, dtype=torch.bfloat16)}


class Trap:
  """Runs a command when it is unpickled."""

  def __init__(self, witness):
    self.witness = witness

  def __reduce__(self):
    return os.mkdir, (str(self.witness),)


# --- one tensor at a time ---

@pytest.fixture
def directory(tmp_path) -> epath.Path:
  return epath.Path(tmp_path)


def refused(path, *words):
  with pytest.raises(UserError) as error:
    read_tensors(path)
  assert "\n" not in str(error.value)
  for word in (path.name, *words):
    assert word in str(error.value), str(error.value)


def shards(directory, weight_map):
  save_file({"a": TENSORS["a"]}, directory / "one.safetensors")
  save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, directory / "two.safetensors")
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return directory


LAYOUTS = {
    "pth": lambda d: torch.save(TENSORS, d / "x.pth") or d / "x.pth",
    "LAVIS pth": lambda d: torch.save({"model": TENSORS, "epoch": 3}, d / "x.pth") or d / "x.pth",
    "safetensors": lambda d: save_file(TENSORS, d / "x.safetensors") or d / "x.safetensors",
    "directory": lambda d: save_file(TENSORS, d / "model.safetensors") or d,
    "shards": lambda d: shards(d, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads(layout, directory):
  path = LAYOUTS[layout](directory)
  assert holds_weights(path)
  tensors = read_tensors(path)
  assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (2, 3), "b": (), "c": (4,)}
  np.testing.assert_array_equal(tensors["a"].read(), [[0, 1, 2], [3, 4, 5]])
  assert tensors["b"].read() == 0.5
  assert tensors["c"].read().dtype in (np.float32, ml_dtypes.bfloat16) and (tensors["c"].read() == 1).all()


def test_a_run_is_no_weights(directory):
  (directory / "checkpoints").mkdir()
  (directory / "config.json").write_text("{}")
  assert not holds_weights(directory)


@pytest.mark.parametrize("layout", ["pth", "safetensors", "directory"])
def test_truncated(layout, directory):
  path = LAYOUTS[layout](directory)
  file = path / "model.safetensors" if path.is_dir() else path
  file.write_bytes(file.read_bytes()[:-20])
  with pytest.raises(UserError, match=rf"{file.name} is not a whole .*Download or save it again"):
    read_tensors(path)


def test_code_is_never_run(directory):
  trap = directory / "trap"
  torch.save({"model": TENSORS, "x": Trap(trap)}, directory / "x.pth")
  refused(directory / "x.pth", "could only be opened by running code in it", "which is never done")
  assert not trap.exists()


def test_not_tensors(directory):
  torch.save({"model": {"a": 3}}, directory / "x.pth")
  refused(directory / "x.pth", "'a' is int, expected a tensor")
  (directory / "y.bin").write_text("hello")
  refused(directory / "y.bin", "Download or save it again")


def test_without_torch(directory, monkeypatch):
  path = LAYOUTS["pth"](directory)
  real = builtins.__import__
  def absent(name, *rest):
    if name == "torch":
      raise ImportError("No module named 'torch'")
    return real(name, *rest)
  monkeypatch.setattr(builtins, "__import__", absent)
  refused(path, "pip install torch, or save the weights as .safetensors")


def test_shards_that_lack_something(directory):
  shards(directory, {"a": "two.safetensors"})
  complaint = "two.safetensors has no tensor a, which model.safetensors.index.json places there"
  with pytest.raises(UserError, match=complaint):
    read_tensors(directory)
  shards(directory, {"a": "three.safetensors"})
  with pytest.raises(UserError, match="three.safetensors cannot be read: No such file"):
    read_tensors(directory)
  (directory / "model.safetensors.index.json").write_text('{"weight')
  with pytest.raises(UserError, match="model.safetensors.index.json is not an index of shards"):
    read_tensors(directory)


# --- all tensors of a file, for torch ---

def assert_loads(path):
  loaded = load_state_dict(path)
  assert loaded.keys() == STATE.keys()
  for name, tensor in STATE.items():
    assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_digest(tmp_path, monkeypatch):
  data = bytes(range(256)) * 5
  (tmp_path / "file").write_bytes(data)
  monkeypatch.setattr(files, "_CHUNK", 100)  # several pieces, and a shorter last one
  assert sha256(tmp_path / "file") == sha256(str(tmp_path / "file")) == hashlib.sha256(data).hexdigest()
  with pytest.raises(UserError, match="none: no such file"):
    sha256(tmp_path / "none")


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickled_weights(tmp_path, name, zipped):
  for content in (STATE, {"model": STATE, "epoch": 3, "optimizer": {"state": {}}}):
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_loads(tmp_path / name)
    assert_loads(str(tmp_path / name))


def test_safetensors(tmp_path):
  save_file(STATE, tmp_path / "a.safetensors")
  assert_loads(tmp_path / "a.safetensors")


def test_a_remote_file_is_fetched_first(tmp_path, monkeypatch):
  """A class that finds `bucket://` in a folder takes the place of remote paths."""
  epath_path = weight_files.epath.Path
  monkeypatch.setattr(weight_files.epath, "Path", lambda path: epath_path(str(path).replace("bucket:/", str(tmp_path))))
  torch.save(STATE, tmp_path / "a.pth")
  save_file(STATE, tmp_path / "a.safetensors")
  for name in ("a.pth", "a.safetensors"):
    fetched = []
    with monkeypatch.context() as patch:
      make = weight_files.tempfile.TemporaryDirectory
      patch.setattr(weight_files.tempfile, "TemporaryDirectory", lambda: fetched.append(make()) or fetched[-1])
      assert_loads(f"bucket://{name}")
    assert len(fetched) == 1 and not os.path.exists(fetched[0].name)
  (tmp_path / "b.pth").write_bytes(b"no weights")
  with pytest.raises(UserError, match="^bucket://b.pth is not a whole .pth file of weights"):
    load_state_dict("bucket://b.pth")


def test_code_is_never_run_for_torch_tensors(tmp_path):
  witness = tmp_path / "witness"
  path = tmp_path / "trap.pth"
  for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
    save({"model": STATE | {"trap": Trap(witness)}}, path)
    with pytest.raises(UserError, match=r"trap.pth could only be opened by running code in it \([\w.]+\)") as error:
      load_state_dict(path)
    assert not witness.exists() and "\n" not in str(error.value)
  torch.save({"model": STATE, "args": argparse.Namespace()}, path)
  with pytest.raises(UserError, match=r"running code in it \(argparse.Namespace\)"):
    load_state_dict(path)


@pytest.mark.parametrize("form", ["zip.pth", "old.pth", "a.safetensors"])
def test_damaged_files(tmp_path, form):
  path = tmp_path / form
  if form.endswith("pth"):
    torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip.pth")
  else:
    save_file(STATE, path)
  whole = path.read_bytes()
  damaged = [whole[:size] for size in (0, 5, 30, len(whole) // 2, len(whole) - 4)]
  for data in (*damaged, b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"):
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{form} is not a whole {path.suffix} file of .* \({len(data)} bytes; "):
      load_state_dict(path)


def test_a_garbled_pickle(tmp_path):
  path = tmp_path / "garbled.pth"
  torch.save(STATE, path)
  data = bytearray(path.read_bytes())
  start = data.index(b"layer.weight")
  data[start:start + 12] = b"\xff" * 12  # this is no UTF-8
  path.write_bytes(data)
  with pytest.raises(UserError, match="garbled.pth is not a whole .pth file of weights: it is damaged"):
    load_state_dict(path)


@pytest.mark.parametrize("content, complaint", [
    (torch.ones(2), "holds Tensor, expected named tensors"),
    ({}, "holds dict, expected named tensors"),
    ({"model": {}, "epoch": 3}, "holds dict, expected named tensors"),
    ({"weight": torch.ones(2), "epoch": 3}, "'epoch' is int, expected a tensor"),
    ({"state_dict": {"weight": torch.ones(2)}}, "'state_dict' is dict, expected a tensor"),
])
def test_something_else_than_weights(tmp_path, content, complaint):
  torch.save(content, tmp_path / "a.pth")
  with pytest.raises(UserError, match=f"a.pth:? {complaint}: name a file"):
    load_state_dict(tmp_path / "a.pth")


def test_wrong_paths(tmp_path):
  with pytest.raises(UserError, match="none.pth: no such file"):
    load_state_dict(tmp_path / "none.pth")
  (tmp_path / "folder.pth").mkdir()
  with pytest.raises(UserError, match="folder.pth is a directory: name the file in it"):
    load_state_dict(tmp_path / "folder.pth")
  (tmp_path / "a.ckpt").touch()
  with pytest.raises(UserError, match="a.ckpt: expected a file of weights, one of .pth, .pt, .bin, .safetensors"):
    load_state_dict(tmp_path / "a.ckpt")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
  torch.save(STATE, tmp_path / "a.pth")

  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(torch, "load", refuse)
  with pytest.raises(UserError, match="a.pth cannot be read: Permission denied"):
    load_state_dict(tmp_path / "a.pth")
