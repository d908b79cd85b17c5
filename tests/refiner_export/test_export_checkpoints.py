"""Tensors of a checkpoint become a module's weights when all of them fit."""

import pytest
import torch

from refiner_export.common.settings import UserError
from refiner_export.refiners.checkpoints import fill


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
