"""A run's newest checkpoint as a Hugging Face directory, which works without this package and without JAX.

`export` reads and writes one tensor at a time, or where a chunk of the checkpoint holds more layers, that many.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from absl import logging

from lyrics_jax.weights import hf_settings
from lyrics_jax.weights.formats import format_of
from lyrics_jax.weights.hf_files import write_json
from lyrics_jax.weights.llama_names import ADAPTER, ADAPTER_FILE, adapter_entries, is_lora
from lyrics_jax.weights.model_card import TRAINING
from lyrics_jax.weights.stored import StoredRun
from lyrics_jax.weights.stream import write_safetensors
from lyrics_jax.weights.table import Entry
from refiner_export.common.settings import require
from refiner_export.common.weight_files import INDEX, SINGLE, Index, Tensor

SHARD_BYTES = 2**31

LoRA = Literal["merge", "adapter"]
Tensors = Mapping[str, Tensor]


def export(checkpoint: str, output: str, lora: LoRA = "merge") -> None:
  """Writes the directory `output`, all or nothing.

  Args:
    checkpoint: the output directory of a run.
    lora: "merge" adds LoRA's product to the kernels, rounded to the dtype in which they are stored. "adapter" leaves
      the language model out: the directory then has the other parts, and LoRA in PEFT's form in `adapter/`. The user
      brings a LLaMA.

  Raises:
    UserError: there is no such run; `output` exists; transformers has no class for the model; or a run without LoRA is
      to be written with "adapter".
  """
  target = pathlib.Path(output)
  require(not target.exists(), f"{output} already exists: remove it, or name another directory")
  run = StoredRun(checkpoint)
  apart = lora == "adapter"
  require(not apart or any(map(is_lora, run.parameters.shapes)),
          f"{checkpoint} has no LoRA, so there is no adapter to write: use --lora=merge")
  temporary = target.with_name(f".{target.name}.partial")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    _write(run, apart, temporary)
    temporary.rename(target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  logging.info("written: %s, step %d of %s", output, run.step, checkpoint)


def _write(run: StoredRun, apart: bool, directory: pathlib.Path) -> None:
  """Writes everything into an empty directory."""
  form = format_of(run.config, apart)
  write_json(directory / "config.json", form.settings())
  form.write_files(directory)

  # --- weights ---
  shapes, model = run.parameters.shapes, run.config.stage.model
  entries = form.entries(shapes)
  if apart:
    entries = {path: entry for path, entry in entries.items() if not path.startswith("llm/")}
    (directory / ADAPTER).mkdir()
    write_safetensors(directory / ADAPTER / ADAPTER_FILE, _tensors(run, adapter_entries(shapes)))
    write_json(directory / ADAPTER / "adapter_config.json", hf_settings.adapter_settings(model.llm.lora))
  _write_shards(directory, _tensors(run, entries, merged=not apart) | form.constants())

  # --- where it comes from ---
  (directory / TRAINING).mkdir()
  (directory / TRAINING / "config.json").write_text(run.config.to_json() + "\n")
  if run.manifest is not None:
    run.manifest.save(directory / TRAINING)
  (directory / "README.md").write_text(form.card(run))


@dataclasses.dataclass(frozen=True)
class _Fetch:
  """Reads a part of a tensor of the exported directory out of a run."""
  run: StoredRun
  path: str
  entry: Entry
  layer: int | None
  merged: bool

  def __call__(self, index: Index) -> np.ndarray:
    return self.entry.form.give(self.run.read(self.path, self.layer, self.merged))[index]


def _tensors(run: StoredRun, entries: Mapping[str, Entry], merged: bool = False) -> dict[str, Tensor]:
  """What a run's parameters, by path, become in the file, by name there; the layers of a stack in order."""
  tensors = {}
  for path, entry in entries.items():
    for layer, name in enumerate(entry.names):
      fetch = _Fetch(run, path, entry, layer if entry.stacked else None, merged)
      tensors[name] = Tensor(name, entry.form.shape(entry.shape), run.dtype(path), fetch)
  return tensors


def _write_shards(directory: pathlib.Path, tensors: Tensors) -> None:
  """`model.safetensors`, or shards and their index."""
  shards = list(_shards(tensors))
  if len(shards) == 1:
    write_safetensors(directory / SINGLE, tensors)
    return
  weight_map, total = {}, 0
  for number, shard in enumerate(shards, start=1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors"
    write_safetensors(directory / file, shard)
    weight_map |= dict.fromkeys(shard, file)
    total += sum(tensor.nbytes for tensor in shard.values())
  write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Tensors) -> Iterator[Tensors]:
  """The tensors in groups of at most `SHARD_BYTES`, or of a single one that is larger."""
  shard, size = {}, 0
  for name, tensor in tensors.items():
    if shard and size + tensor.nbytes > SHARD_BYTES:
      yield shard
      shard, size = {}, 0
    shard[name] = tensor
    size += tensor.nbytes
  yield shard
