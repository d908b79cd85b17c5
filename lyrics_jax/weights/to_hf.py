"""A run's newest checkpoint as a Hugging Face directory, which works without this package and without JAX.

`export` reads and writes one tensor at a time, or where a chunk of the checkpoint holds more layers, that many.
"""

import functools
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import tokenizers
from absl import logging

from lyrics_jax.config import Config
from lyrics_jax.data.tokenizers import load_llm_tokenizer, load_mq_former_tokenizer
from lyrics_jax import torch_model
from lyrics_jax.weights import hf_settings
from lyrics_jax.weights import lyrics_names
from lyrics_jax.weights import model_card
from lyrics_jax.weights.lyrics_names import ADAPTER, ADAPTER_FILE, TRAINING
from lyrics_jax.weights.read import INDEX, SINGLE, Index, Tensor
from lyrics_jax.weights.stored import StoredRun
from lyrics_jax.weights.stream import write_safetensors
from lyrics_jax.weights.table import Entry
from refiner_export.common.settings import require

SHARD_BYTES = 2**31
MQ_FORMER_TOKENIZER = "mq_former_tokenizer"  # directory of that tokenizer inside the exported one
MODULES = ("configuration_lyrics.py", "modeling_lyrics.py", "processing_lyrics.py")  # copied as they are

LoRA = Literal["merge", "adapter"]
Tensors = Mapping[str, Tensor]


def export(checkpoint: str, output: str, lora: LoRA = "merge") -> None:
  """Writes the directory `output`, all or nothing.

  Args:
    checkpoint: the output directory of a run of either stage.
    lora: "merge" adds LoRA's product to the kernels, rounded to the dtype in which they are stored. "adapter" leaves
      the language model out: the directory then has image encoder, MQ-Former and projection, and LoRA in PEFT's form
      in `adapter/`, for a LLaMA of the user's own.

  Raises:
    UserError: no such run, `output` exists, or "adapter" of a run without LoRA.
  """
  target = pathlib.Path(output)
  require(not target.exists(), f"{output} already exists: remove it, or name another directory")
  run = StoredRun(checkpoint)
  config, shapes = run.config, run.plan.shapes
  apart = lora == "adapter"
  require(not apart or any(map(lyrics_names.is_lora, shapes)),
          f"{checkpoint} has no LoRA, so there is no adapter to write: use --lora=merge")
  temporary = target.with_name(f".{target.name}.partial")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    # --- weights ---
    entries = lyrics_names.entries(config.model, shapes)
    kept = {path: entry for path, entry in entries.items() if not (apart and path.startswith("llm/"))}
    _write_shards(temporary, _tensors(run, kept, merged=not apart))
    if apart:
      (temporary / ADAPTER).mkdir()
      adapter = lyrics_names.adapter_entries(config.model, shapes)
      write_safetensors(temporary / ADAPTER / ADAPTER_FILE, _tensors(run, adapter))
      _write_json(temporary / ADAPTER / "adapter_config.json", hf_settings.adapter_settings(config))

    # --- everything else ---
    _write_json(temporary / "config.json", hf_settings.model_settings(config, apart))
    _write_json(temporary / hf_settings.PROCESSOR, hf_settings.processor_settings(config))
    write_tokenizers(temporary, config)
    (temporary / TRAINING).mkdir()
    (temporary / TRAINING / "config.json").write_text(config.to_json() + "\n")
    if run.manifest is not None:
      run.manifest.save(temporary / TRAINING)
    (temporary / "README.md").write_text(model_card.render(config, run.manifest, run.step, apart))
    for name in MODULES:
      shutil.copyfile(pathlib.Path(torch_model.__file__).with_name(name), temporary / name)
    temporary.rename(target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  logging.info("written: %s, step %d of %s", output, run.step, checkpoint)


def _tensors(run: StoredRun, entries: Mapping[str, Entry], merged: bool = False) -> dict[str, Tensor]:
  """What a run's parameters, by path, become in the file, by name there; the layers of a stack in order."""
  def fetch(path: str, layer: int | None, index: Index) -> np.ndarray:
    return entries[path].form.give(run.read(path, layer, merged))[index]

  return {name: Tensor(name, entry.form.shape(entry.shape), run.dtype(path),
                       functools.partial(fetch, path, layer if entry.stacked else None))
          for path, entry in entries.items() for layer, name in enumerate(entry.names)}


def _write_shards(directory: pathlib.Path, tensors: Tensors) -> None:
  """`model.safetensors`, or shards and their index."""
  shards = list(_shards(tensors))
  files = [SINGLE] if len(shards) == 1 else [
      f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
  for file, shard in zip(files, shards):
    write_safetensors(directory / file, shard)
  if len(files) > 1:
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


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


def write_tokenizers(directory: pathlib.Path, config: Config) -> None:
  """The tokenizers as training used them, added tokens included."""
  former = load_mq_former_tokenizer(config.data.mq_former_tokenizer)
  special = {"pad_token": former.pad, "cls_token": former.cls, "sep_token": former.sep, "mask_token": former.mask,
             "unk_token": former.backend.token_to_id("[UNK]")}
  _write_tokenizer(directory / MQ_FORMER_TOKENIZER, former.backend, special, padding_side="right")
  if config.stage == "instruct":
    llm = load_llm_tokenizer(config.data.llm_tokenizer)
    special = {"bos_token": llm.bos, "eos_token": llm.eos, "pad_token": llm.pad}
    _write_tokenizer(directory, llm.backend, special, padding_side="left",
                     model_max_length=config.model.llm.max_positions)
    _write_json(directory / "generation_config.json", hf_settings.generation_settings(llm))


def _write_tokenizer(directory: pathlib.Path, backend: tokenizers.Tokenizer, special: dict[str, int], **more) -> None:
  """tokenizer.json, for `PreTrainedTokenizerFast`: it rebuilds nothing from its parts, as more special classes do."""
  directory.mkdir(exist_ok=True)
  backend.save(str(directory / "tokenizer.json"))
  _write_json(directory / "tokenizer_config.json", {
      "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
      **{name: backend.id_to_token(index) for name, index in special.items()}, **more})


def _write_json(path: pathlib.Path, values: dict) -> None:
  path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
