"""The one door for weights: what a file or directory holds is recognised by its content.

`config.init_from` of a training and `convert from-hf` read the same kinds.
"""

import dataclasses
from collections.abc import Callable

from etils import epath

from lyrics_jax.models.base import ModelSettings
from lyrics_jax.training.parameters import ModelParameters
from lyrics_jax.weights import blip2
from lyrics_jax.weights import clip_names
from lyrics_jax.weights import earlier_run
from lyrics_jax.weights import llama_names
from lyrics_jax.weights import llava_names
from lyrics_jax.weights import lyrics_names
from lyrics_jax.weights import ziya
from lyrics_jax.weights.table import Origin, Shapes
from refiner_export.common.settings import UserError, existing_path, require
from refiner_export.common.weight_files import holds_weights, read_tensors


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of published weights.

  Attributes:
    name: as the flags of `convert from-hf` call it.
    meaning: for a person.
    recognises: whether a file with tensors of these names is of this kind.
    find: what such a file has for a model.
  """
  name: str
  meaning: str
  recognises: Callable[[set[str]], bool]
  find: Callable[[epath.Path, ModelSettings, Shapes], Origin]


# In the order in which `convert from-hf` takes a part that several of them have. The last kind that recognises a file
# counts: the published Lyrics weights also hold a Q-Former, and LLaVA also holds a CLIP and a LLaMA.
KINDS = (
    Kind("clip", "CLIP: a Hugging Face directory or file", clip_names.recognises, clip_names.find),
    Kind("llama", "LLaMA or Vicuna: a Hugging Face directory", llama_names.recognises, llama_names.find),
    Kind("blip2", "BLIP-2 stage 1: LAVIS' .pth, or a Hugging Face directory", blip2.recognises, blip2.find),
    Kind("ziya", "the published Lyrics weights: a directory of Ziya-Visual-Lyrics-14B; its refiner is written out too",
         ziya.recognises, ziya.find),
    Kind("lyrics", "a directory that to-hf wrote of a Lyrics model", lyrics_names.recognises, lyrics_names.find),
    Kind("llava", "LLaVA: a Hugging Face directory, published or written by to-hf", llava_names.recognises,
         llava_names.find),
)
REMEDY = "Name the output directory of an earlier run, a file of weights, or a Hugging Face directory"


def find(path: str, model_parameters: ModelParameters, kind: str | None = None,
         flag: str = "config.init_from") -> Origin:
  """What lies at `path` for a model.

  Args:
    path: output directory of a run, file of weights, or directory in Hugging Face's form.
    model_parameters: names and shapes of the model's parameters.
    kind: name of the kind, one of `KINDS`; None recognises it, a run included.
    flag: what names the path, for messages.

  Raises:
    UserError: nothing is there; nothing is known of that kind; or it is not whole, or does not fit the model.
  """
  place = existing_path(path, flag, REMEDY)
  if kind is None and earlier_run.is_run(place):
    find_there = earlier_run.find
  elif kind is None:
    find_there = _recognised(place, flag).find
  else:
    find_there = next(known for known in KINDS if known.name == kind).find
  return find_there(place, model_parameters.config.stage.model, model_parameters.shapes)


def _recognised(place: epath.Path, flag: str) -> Kind:
  """The kind of a file or directory of weights."""
  require(holds_weights(place), f"{flag}={place} is neither a run nor weights. {REMEDY}")
  names = read_tensors(place).keys()
  for kind in reversed(KINDS):
    if kind.recognises(names):
      return kind
  kinds = ", ".join(kind.name for kind in KINDS)
  raise UserError(f"{flag}={place} holds none of the known kinds of weights ({kinds}). {REMEDY}")
