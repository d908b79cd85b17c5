"""Small files of an exported directory: JSON, and tokenizers as training used them."""

import json
import pathlib

import tokenizers

from lyrics_jax.data.tokenizers import LLMTokenizer, MQFormerTokenizer


def write_json(path: pathlib.Path, values: dict) -> None:
  path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_llm_tokenizer(directory: pathlib.Path, tokenizer: LLMTokenizer, max_length: int, **more) -> None:
  """The language model's tokenizer, padded at the left, because answers are written behind prompts.

  Args:
    more: entries of tokenizer_config.json.
  """
  special = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
  _write_tokenizer(directory, tokenizer.backend, special, padding_side="left", model_max_length=max_length,
                   **more)


def write_mq_former_tokenizer(directory: pathlib.Path, tokenizer: MQFormerTokenizer) -> None:
  """The MQ-Former's tokenizer, its added tokens included."""
  special = {"pad_token": tokenizer.pad, "cls_token": tokenizer.cls, "sep_token": tokenizer.sep,
             "mask_token": tokenizer.mask, "unk_token": tokenizer.backend.token_to_id("[UNK]")}
  _write_tokenizer(directory, tokenizer.backend, special, padding_side="right")


def _write_tokenizer(directory: pathlib.Path, backend: tokenizers.Tokenizer, special: dict[str, int], **more) -> None:
  """tokenizer.json for `PreTrainedTokenizerFast`. More special classes would rebuild the tokenizer from its parts."""
  directory.mkdir(exist_ok=True)
  backend.save(str(directory / "tokenizer.json"))
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
  for name, index in special.items():
    settings[name] = backend.id_to_token(index)
  write_json(directory / "tokenizer_config.json", settings | more)
