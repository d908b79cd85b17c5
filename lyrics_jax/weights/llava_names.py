"""LLaVA in a Hugging Face directory (`LlavaForConditionalGeneration`): the names of its weights, read in both
directions.

    vision_tower.vision_model.*               CLIP's image encoder
    multi_modal_projector.linear_1, linear_2  the connector
    language_model.*                          LLaMA

These are the names of the published files, which every version of transformers reads. Other versions write other names:
`published_name` translates them.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from lyrics_jax.models.base import ModelSettings
from lyrics_jax.models.layers.int8 import SCALE
from lyrics_jax.weights import clip_names
from lyrics_jax.weights import llama_names
from lyrics_jax.weights.sizes import check_fixed, read_settings
from lyrics_jax.weights.table import Entry, Form, Origin, Shape, Shapes, account, single_entries
from refiner_export.common.settings import require
from refiner_export.common.weight_files import Tensor, read_tensors

VISION_PREFIX, LANGUAGE_PREFIX = "vision_tower.vision_model.", "language_model."
FINAL_NORM = f"{VISION_PREFIX}post_layernorm"  # its result is not read
_PROJECTOR = "multi_modal_projector."
_LINEAR = {f"connector/{name}": _PROJECTOR + name for name in ("linear_1", "linear_2")}
_WORDS, _HEAD = "llm/words/embedding", "llm/head/kernel"
_NAMES = (  # the names that transformers' classes have inside, and that versions 4.52 and later may write
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", r"language_model.model."),
    (r"^lm_head\.", r"language_model.lm_head."),
    (r"^vision_tower\.(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_tower.vision_model.\1."),
)
UNREAD = "blocks whose output is not read"
LEFT_OVER = {
    "CLIP's final norm, whose result is not read": rf"{re.escape(FINAL_NORM)}\..*",
    "position numbers": r".*\.position_ids",
    llama_names.ROTARY: r".*\.rotary_emb\.inv_freq",
}


@dataclasses.dataclass(frozen=True)
class WithAddedRows(Form):
  """In the file, rows of added tokens stand behind our rows.

  Reading leaves them out. Writing fills them with the mean of our rows: a token whose logit is the mean of all logits
  is never the most probable one.

  Attributes:
    form: how our rows lie in the file.
    count: how many rows are added.
  """
  form: Form
  count: int

  def shape(self, ours: Shape) -> Shape:
    rows, *others = self.form.shape(ours)
    return (rows + self.count, *others)

  def take(self, there: np.ndarray) -> np.ndarray:
    return self.form.take(there[:len(there) - self.count])

  def give(self, ours: np.ndarray) -> np.ndarray:
    there = self.form.give(ours)
    mean = there.astype(np.float32).mean(0, keepdims=True).astype(there.dtype)
    return np.concatenate([there, np.repeat(mean, self.count, axis=0)])

  def axes(self, dimensions: int) -> None:
    return None


def entries(shapes: Shapes, added: int) -> dict[str, Entry]:
  """Where LLaVA's files have our parameters. LoRA's parameters are not there.

  Args:
    added: how many rows more than ours word embedding and output head have.
  """
  found = clip_names.NAMES.entries(shapes, VISION_PREFIX) | llama_names.entries(shapes, LANGUAGE_PREFIX)
  found |= single_entries(shapes, _LINEAR, {})
  for path in (_WORDS, _HEAD):
    if added:
      found[path] = dataclasses.replace(found[path], form=WithAddedRows(found[path].form, added))
  for path in shapes:
    assert path in found or llama_names.is_lora(path) or path.endswith(SCALE), path
  return found


def published_name(name: str) -> str:
  """The published files' name of a tensor that some version of transformers calls `name`."""
  for pattern, replacement in _NAMES:
    name = re.sub(pattern, replacement, name)
  return name


def recognises(names: set[str]) -> bool:
  """Whether a file with tensors of these names holds a LLaVA."""
  return any(published_name(name).startswith(_PROJECTOR) for name in names)


def find(path: epath.Path, model: ModelSettings, shapes: Shapes) -> Origin:
  """What the LLaVA weights at `path` have for a model with parameters of these shapes.

  Blocks of the image encoder that do not run here are left out, and so are rows of added tokens.

  Raises:
    UserError: the file is not whole, or does not fit the model.
  """
  require("connector/linear_2/kernel" in shapes,
          f"{path}: its connector is an MLP; set config.stage.model to a VLMSettings with connector=MLPSettings()")
  tensors = {}
  for name, tensor in read_tensors(path).items():
    tensors[published_name(name)] = tensor
  depth = _depth(tensors)
  _check_settings(path, model, depth)
  added = 0
  words = tensors.get(f"{LANGUAGE_PREFIX}model.embed_tokens.weight")
  if words is not None:
    added = max(words.shape[0] - model.llm.vocab_size, 0)
  unread = "|".join(map(str, range(model.vision.layers, depth)))
  reasons = LEFT_OVER | {UNREAD: rf"{re.escape(VISION_PREFIX)}encoder\.layers\.({unread})\..*"}
  return account(str(path), tensors, entries(shapes, added), _required, _remedy, reasons)


def _depth(tensors: Mapping[str, Tensor]) -> int:
  """How many blocks the image encoder of a file has."""
  depth = 0
  for name in tensors:
    if match := re.match(rf"{re.escape(VISION_PREFIX)}encoder\.layers\.(\d+)\.", name):
      depth = max(depth, int(match[1]) + 1)
  return depth


def _check_settings(path: epath.Path, model: ModelSettings, depth: int) -> None:
  """Requires that LLaVA's config.json agrees with our settings. `depth`: blocks of the file's image encoder."""
  settings = read_settings(path)
  clip_names.check(path, settings.get("vision_config") or {}, model)
  text = dict(settings.get("text_config") or {})
  text.pop("vocab_size", None)  # rows of added tokens count in it
  llama_names.check(path, text, model.llm)
  check_fixed(path, settings, {"projector_hidden_act": "gelu", "multimodal_projector_bias": True})
  where, layer = "config.stage.model.vision", settings.get("vision_feature_layer", -2)
  require(isinstance(layer, int), f"{path}: vision_feature_layer is {layer}, only one layer can be read here")
  running = layer if layer >= 0 else depth + 1 + layer
  require(model.vision.layers == running, f"{path}: the output of block {running} of {depth} is read, {where}.layers="
                                          f"{model.vision.layers}; set {where}.layers={running}")
  strategy = settings.get("vision_feature_select_strategy", "default")
  class_token = {"default": "drop", "full": "keep"}.get(strategy)
  require(model.vision.class_token == class_token, f"{path}: vision_feature_select_strategy is {strategy}; set "
                                                   f"{where}.class_token={class_token}")


def _required(component: str) -> bool:
  return True


def _remedy(path: str, there: Shape, needed: Shape) -> str:
  if path.startswith("connector/"):
    return "make config.stage.model agree with the file"
  return llama_names.remedy(path, there, needed) if path.startswith("llm/") else clip_names.remedy(path, there, needed)
