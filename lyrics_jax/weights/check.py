"""Compares a run's newest checkpoint with the Hugging Face directory made of it: both models, the same made-up inputs.

Both sum float32 numbers in another order, which makes differences of about 1e-5 in outputs of size 1. Exported kernels
are also rounded where LoRA was merged into bfloat16, and where they were in int8.
"""

import dataclasses
import gc

import jax
import numpy as np
import torch
from etils import epath

from lyrics_jax.data.batch import Batch
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.training.checkpoint import saved_config
from lyrics_jax.training.parameters import ModelParameters
from lyrics_jax.weights import sources
from lyrics_jax.weights.formats import FORMATS, format_of
from lyrics_jax.weights.hf_format import HFFormat
from lyrics_jax.weights.sizes import read_settings
from refiner_export.common.settings import require


def compare(checkpoint: str, hf_directory: str) -> dict[str, float]:
  """Prints and returns the largest difference per part; a part that only one of them has is left out.

  Raises:
    UserError: there is no such run or directory, the directory is not made of the run, or it is not whole.
  """
  directory = epath.Path(hf_directory)
  form = format_of(saved_config(checkpoint))
  _require_format(directory, form, checkpoint)
  model_parameters = ModelParameters.of(form.config)
  # transformers would fill in at random what is missing, and say so among other things.
  sources.find(hf_directory, model_parameters, form.kind, "--hf").require_known()
  batch = form.made_up_batch()
  ours = _outputs(checkpoint, form, batch)
  gc.collect()  # the two models need not be in memory at once
  differences = {}
  print(f"{'part':16}{'largest difference':>20}{'largest value':>16}")
  for name, value in torch_outputs(form, form.load(directory), batch).items():
    expected = ours.pop(name)
    require(value.shape == expected.shape, f"{hf_directory} is not made of {checkpoint}: {name} has shape "
                                           f"{value.shape} there, {expected.shape} here")
    differences[name] = float(np.abs(value - expected).max())
    print(f"{name:16}{differences[name]:20.2e}{np.abs(expected).max():16.3g}")
  for name in ours:
    print(f"{name:16}{'not in the directory':>20}")
  return differences


def torch_outputs(form: HFFormat, model: torch.nn.Module, batch: Batch) -> dict[str, np.ndarray]:
  """What each part of an exported model makes of a batch, in float32."""
  outputs = {}
  with torch.no_grad():
    for name, value in form.torch_outputs(model, batch).items():
      outputs[name] = value.float().numpy()
  return outputs


def _require_format(directory: epath.Path, form: HFFormat, checkpoint: str) -> None:
  """Raises `UserError` unless the directory holds a model of the run's class."""
  require((directory / "config.json").exists(),
          f"{directory} is not a Hugging Face directory, it has no config.json: name one that to-hf wrote")
  found = next(iter(read_settings(directory).get("architectures") or []), "")
  known = [other.architecture for other in FORMATS]
  require(found in known, f"{directory} holds a {found or 'model of unknown class'}, expected one of "
                          f"{', '.join(known)}: name a directory that to-hf wrote")
  require(found == form.architecture, f"{directory} holds a {found}, but {checkpoint} is written as a "
                                      f"{form.architecture}: name the directory that was made of it")


def _outputs(checkpoint: str, form: HFFormat, batch: Batch) -> dict[str, np.ndarray]:
  """What each part of a run's model makes of a batch, computed in float32 even if the run trains in bfloat16."""
  loaded = LoadedModel.open(checkpoint)
  compute = dataclasses.replace(form.config.compute, dtype="float32")
  config = dataclasses.replace(form.config, compute=compute)
  config.finalize()
  in_float32 = LoadedModel(ModelParameters.of(config), loaded.mesh, *loaded.parameters)
  return jax.device_get(in_float32.compiled(form.jax_outputs)(batch))
