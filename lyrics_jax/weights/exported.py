"""A directory that `to_hf` wrote, as a source: everything that it holds, bit by bit."""

from collections.abc import Mapping

import jax
from etils import epath

from lyrics_jax.config import ModelConfig
from lyrics_jax.weights.lyrics_names import ADAPTER, ADAPTER_FILE, LANGUAGE_PREFIX, adapter_entries, entries
from lyrics_jax.weights.read import read_tensors
from lyrics_jax.weights.table import Source, account


def find(path: epath.Path, config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Source:
  """What an exported directory has for a model with parameters of these shapes.

  Where LoRA was merged, its adapters are as initialised: they add nothing. Where it was not, the language model's own
  weights are not in the directory, and come from another source. Raises `UserError`.
  """
  tensors = read_tensors(path)
  ours = entries(config, shapes)
  if not any(name.startswith(LANGUAGE_PREFIX) for name in tensors):
    ours = {name: entry for name, entry in ours.items() if not name.startswith("llm/")}
  adapter = path / ADAPTER / ADAPTER_FILE
  if adapter.exists():
    tensors |= read_tensors(adapter)
    ours |= adapter_entries(config, shapes)
  remedy = "make config.model agree with the directory"
  return account(str(path), tensors, ours, lambda name: name != "llm", lambda *_: remedy, {})
