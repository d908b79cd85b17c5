"""A run's newest checkpoint as a Hugging Face directory, which works without this package and without JAX.

`export` reads a few parameters at a time and writes shards of at most `SHARD_BYTES`, so that the host needs the memory
of twice the largest parameter (one kernel of all layers, 5.7 GB in LLaMA-13B) and of one shard, not of a model.
"""

import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
import tokenizers
from absl import logging
from safetensors.numpy import save_file

from lyrics_jax.config import Config
from lyrics_jax.data.tokenizers import load_llm_tokenizer, load_mq_former_tokenizer
from lyrics_jax.hf import hf_settings, lyrics_names, model_card
from lyrics_jax.hf.lyrics_names import ADAPTER, ADAPTER_FILE, TRAINING
from lyrics_jax.hf.read import INDEX, SINGLE
from lyrics_jax.hf.stored import StoredRun
from lyrics_jax.hf.table import Entry
from refiner_export.settings import require

SHARD_BYTES = 2**31
MQ_FORMER_TOKENIZER = "mq_former_tokenizer"  # directory of that tokenizer inside the exported one
MODULES = ("configuration_lyrics.py", "modeling_lyrics.py", "processing_lyrics.py")  # copied as they are

LoRA = Literal["merge", "adapter"]
Tensors = Iterable[tuple[str, np.ndarray]]


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
    kept = [path for path in entries if not (apart and path.startswith("llm/"))]
    _write_shards(temporary, _tensors(entries, run.read(kept, merged=not apart)))
    if apart:
      (temporary / ADAPTER).mkdir()
      adapter = lyrics_names.adapter_entries(config.model, shapes)
      save_file(dict(_tensors(adapter, run.read(adapter))), temporary / ADAPTER / ADAPTER_FILE, {"format": "pt"})
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
      shutil.copyfile(pathlib.Path(__file__).with_name(name), temporary / name)
    temporary.rename(target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  logging.info("written: %s, step %d of %s", output, run.step, checkpoint)


def _tensors(entries: Mapping[str, Entry], parameters: Iterable[tuple[str, np.ndarray]]) -> Tensors:
  """What parameters, given by path, become in the file."""
  for path, value in parameters:
    yield from lyrics_names.give(entries[path], value)
    del value  # which would else be in memory until the next one is read


def _write_shards(directory: pathlib.Path, tensors: Tensors) -> None:
  """`model.safetensors`, or shards and their index."""
  names_of, total = [], 0
  for shard in _shards(tensors):
    save_file(shard, directory / f"{len(names_of)}.part", {"format": "pt"})  # without it transformers refuses the file
    names_of.append(list(shard))
    total += sum(tensor.nbytes for tensor in shard.values())
    del shard  # which would else be in memory until the next one is full
  files = [f"model-{n + 1:05}-of-{len(names_of):05}.safetensors" for n in range(len(names_of))]
  for number, file in enumerate(files):
    (directory / f"{number}.part").rename(directory / (SINGLE if len(files) == 1 else file))
  if len(files) > 1:
    weight_map = {name: file for file, names in zip(files, names_of) for name in names}
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Tensors) -> Iterator[dict[str, np.ndarray]]:
  """The tensors in groups of at most `SHARD_BYTES`, or of a single one that is larger."""
  shard, size = {}, 0
  for name, tensor in tensors:
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
