"""Files of weights: what is read, and what is said about files that cannot be."""

import argparse
import hashlib
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from refiner_export.refiners import checkpoints
from refiner_export.refiners.checkpoints import fill, load_state_dict, sha256
from refiner_export.common.settings import UserError

WEIGHTS = {"layer.weight": torch.arange(6.).reshape(2, 3), "layer.bias": torch.ones(2, dtype=torch.bfloat16)}


class Trap:
  """Runs a command when it is unpickled."""

  def __init__(self, witness):
    self.witness = witness

  def __reduce__(self):
    return os.mkdir, (str(self.witness),)


def assert_loads(path):
  loaded = load_state_dict(path)
  assert loaded.keys() == WEIGHTS.keys()
  for name, tensor in WEIGHTS.items():
    assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_digest(tmp_path, monkeypatch):
  data = bytes(range(256)) * 5
  (tmp_path / "file").write_bytes(data)
  monkeypatch.setattr(checkpoints, "_CHUNK", 100)  # several pieces, the last of them shorter
  assert sha256(tmp_path / "file") == sha256(str(tmp_path / "file")) == hashlib.sha256(data).hexdigest()
  with pytest.raises(UserError, match="none: no such file"):
    sha256(tmp_path / "none")


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickled_weights(tmp_path, name, zipped):
  for content in (WEIGHTS, {"model": WEIGHTS, "epoch": 3, "optimizer": {"state": {}}}):
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_loads(tmp_path / name)
    assert_loads(str(tmp_path / name))


def test_safetensors(tmp_path):
  save_file(WEIGHTS, tmp_path / "a.safetensors")
  assert_loads(tmp_path / "a.safetensors")


def test_a_remote_file_is_fetched_first(tmp_path, monkeypatch):
  """Remote paths are stood in for by a class that finds `bucket://` in a folder."""
  epath_path = checkpoints.epath.Path
  monkeypatch.setattr(checkpoints.epath, "Path", lambda path: epath_path(str(path).replace("bucket:/", str(tmp_path))))
  torch.save(WEIGHTS, tmp_path / "a.pth")
  save_file(WEIGHTS, tmp_path / "a.safetensors")
  for name in ("a.pth", "a.safetensors"):
    fetched = []
    with monkeypatch.context() as patch:
      make = checkpoints.tempfile.TemporaryDirectory
      patch.setattr(checkpoints.tempfile, "TemporaryDirectory", lambda: fetched.append(make()) or fetched[-1])
      assert_loads(f"bucket://{name}")
    assert len(fetched) == 1 and not os.path.exists(fetched[0].name)
  (tmp_path / "b.pth").write_bytes(b"no weights")
  with pytest.raises(UserError, match="^bucket://b.pth is no file of weights"):
    load_state_dict("bucket://b.pth")


def test_code_is_never_run(tmp_path):
  witness = tmp_path / "witness"
  path = tmp_path / "trap.pth"
  for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
    save({"model": WEIGHTS | {"trap": Trap(witness)}}, path)
    with pytest.raises(UserError, match=r"trap.pth could only be opened by running code in it \([\w.]+\)") as error:
      load_state_dict(path)
    assert not witness.exists() and "\n" not in str(error.value)
  torch.save({"model": WEIGHTS, "args": argparse.Namespace()}, path)
  with pytest.raises(UserError, match=r"running code in it \(argparse.Namespace\)"):
    load_state_dict(path)


@pytest.mark.parametrize("form", ["zip.pth", "old.pth", "a.safetensors"])
def test_damaged_files(tmp_path, form):
  path = tmp_path / form
  if form.endswith("pth"):
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=form == "zip.pth")
  else:
    save_file(WEIGHTS, path)
  whole = path.read_bytes()
  damaged = [whole[:size] for size in (0, 5, 30, len(whole) // 2, len(whole) - 4)]
  for data in (*damaged, b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"):
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{form} is no file of weights, or is damaged or cut off \({len(data)} byt"):
      load_state_dict(path)


def test_a_garbled_pickle(tmp_path):
  path = tmp_path / "garbled.pth"
  torch.save(WEIGHTS, path)
  data = bytearray(path.read_bytes())
  start = data.index(b"layer.weight")
  data[start:start + 12] = b"\xff" * 12  # no UTF-8
  path.write_bytes(data)
  with pytest.raises(UserError, match="garbled.pth is no file of weights, or is damaged"):
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
  torch.save(WEIGHTS, tmp_path / "a.pth")

  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(torch, "load", refuse)
  with pytest.raises(UserError, match="a.pth cannot be read: Permission denied"):
    load_state_dict(tmp_path / "a.pth")


def make_module():
  with torch.device("meta"):
    return torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.LayerNorm(2)})


def test_filling():
  source = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.LayerNorm(2)}).state_dict()
  module = make_module()
  fill(module, source, "x.pth", "Remedy")
  assert module["a"].weight.data_ptr() == source["a.weight"].data_ptr()
  x = torch.ones(4, 3)
  torch.testing.assert_close(module["a"](x), x @ source["a.weight"].T + source["a.bias"])


@pytest.mark.parametrize("changes, complaint", [
    ({"a.bias": None}, "x.pth lacks a.bias. Remedy"),
    ({"a.bias": None, "b.weight": None, "b.bias": None}, "x.pth lacks a.bias and 2 more. Remedy"),
    ({"c": torch.ones(1)}, "x.pth holds c, which this model does not have. Remedy"),
    ({"d": torch.ones(1), "c": torch.ones(1)}, "x.pth holds d and 1 more, which this model does not have. Remedy"),
    ({"a.weight": torch.ones(2, 4)}, "x.pth: a.weight has the shape (2, 4), expected (2, 3). Remedy"),
    ({"b.bias": torch.ones(())}, "x.pth: b.bias has the shape (), expected (2,). Remedy"),
])
def test_weights_that_do_not_fit(changes, complaint):
  tensors = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2), "b.weight": torch.ones(2), "b.bias": torch.ones(2)}
  tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
  with pytest.raises(UserError) as error:
    fill(make_module(), tensors, "x.pth", "Remedy")
  assert str(error.value) == complaint
