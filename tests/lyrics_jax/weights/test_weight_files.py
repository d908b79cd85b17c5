"""Weight files of every layout are read tensor by tensor; a broken or dangerous one is one clear line."""

import builtins
import json
import os

import ml_dtypes
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.torch import save_file

from lyrics_jax.weights.read import holds_weights, read_tensors
from refiner_export.common.settings import UserError

TENSORS = {"a": torch.arange(6.).reshape(2, 3), "b": torch.tensor(0.5), "c": torch.ones(4, dtype=torch.bfloat16)}


class Dangerous:
  """Unpickled, it would make a directory."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


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
  torch.save({"model": TENSORS, "x": Dangerous(str(trap))}, directory / "x.pth")
  refused(directory / "x.pth", "is refused: it holds pickled code, which is never run")
  assert not trap.exists()


def test_not_tensors(directory):
  torch.save({"model": {"a": 3}}, directory / "x.pth")
  refused(directory / "x.pth", "not a dictionary of tensors", "state_dict()")
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
  with pytest.raises(UserError, match="two.safetensors has no tensor a, which model.safetensors.index.json places there"):
    read_tensors(directory)
  shards(directory, {"a": "three.safetensors"})
  with pytest.raises(UserError, match="three.safetensors is not a whole .safetensors file"):
    read_tensors(directory)
  (directory / "model.safetensors.index.json").write_text('{"weight')
  with pytest.raises(UserError, match="model.safetensors.index.json is not an index of shards"):
    read_tensors(directory)
