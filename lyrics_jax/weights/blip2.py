"""BLIP-2's Q-Former (Li et al. 2023), from which the MQ-Former starts: the names of its weights.

Two layouts are read. LAVIS' files are `blip2_pretrained_vitL.pth`, with CLIP's image encoder in OpenAI's names where
the file has one, and `blip2_pretrained.pth`, with ViT-g. Hugging Face's are `Blip2ForImageTextRetrieval`,
`Blip2QFormerModel` and `InstructBlipQFormerModel`. A ViT-g in the file is read where config.stage.model.vision is
one. The tables are in LAVIS' names, but for ViT-g's (see `eva_names.py`); `lavis_name` translates Hugging Face's.
What BLIP-2 lacks stays as initialised: grounding queries and their cross-attention, local tokens, the rows of added
words.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np
from absl import logging
from etils import epath

from lyrics_jax.models.base import ModelSettings
from lyrics_jax.weights import eva_names
from lyrics_jax.weights.table import (PATCH, PLAIN, THIRDS, Behind, Entry, Names, Origin, Shape, Shapes, account,
                                      component, single_entries)
from refiner_export.common.settings import require
from refiner_export.common.weight_files import Tensor, read_tensors

FORMER, BERT, HEAD = "connector/former", "Qformer.bert", "Qformer.cls.predictions"
CLIP_PREFIX = "visual_encoder."
TIED = {f"{HEAD}.decoder.weight": f"{BERT}.embeddings.word_embeddings.weight", f"{HEAD}.decoder.bias": f"{HEAD}.bias"}


def _layer() -> dict[str, str]:
  """The modules of a layer of the Q-Former."""
  layer = {"query_mlp/up": "intermediate_query.dense.", "query_mlp/down": "output_query.dense.",
           "query_mlp/norm": "output_query.LayerNorm.", "text_mlp/up": "intermediate.dense.",
           "text_mlp/down": "output.dense.", "text_mlp/norm": "output.LayerNorm."}
  attention = {"q": "self.query.", "k": "self.key.", "v": "self.value.", "o": "output.dense.",
               "norm": "output.LayerNorm."}
  for ours, name in attention.items():
    layer[f"self_attention/{ours}"] = f"attention.{name}"
    layer[f"visual_attention/{ours}"] = f"crossattention.{name}"
  return layer


Q_FORMER = Names(
    FORMER,
    parameters={"queries": ("query_tokens", Behind(1))},
    modules={"words": f"{BERT}.embeddings.word_embeddings", "positions": f"{BERT}.embeddings.position_embeddings",
             "norm": f"{BERT}.embeddings.LayerNorm"},
    layers=f"{BERT}.encoder.layer",
    layer=_layer())
OPENAI_CLIP = Names(
    "vision",
    parameters={"patch/kernel": ("conv1.weight", PATCH), "class_token": ("class_embedding", PLAIN),
                "positions": ("positional_embedding", PLAIN)},
    modules={"input_norm": "ln_pre"},
    layers="transformer.resblocks",
    layer={"attention_norm": "ln_1.", "q": "attn.in_proj_", "k": "attn.in_proj_", "v": "attn.in_proj_",
           "o": "attn.out_proj.", "mlp_norm": "ln_2.", "up": "mlp.c_fc.", "down": "mlp.c_proj."},
    forms=THIRDS)
# Parameters and modules outside the Q-Former and the image encoder.
_PARAMETERS = {"lm_head/bias": f"{HEAD}.bias", "temperature": "temp"}
_MODULES = {"connector/image_norm": "ln_vision", "lm_head/dense": f"{HEAD}.transform.dense",
            "lm_head/norm": f"{HEAD}.transform.LayerNorm", "itm": "itm_head"}
_FEWER_ROWS = (f"{FORMER}/words/embedding", "lm_head/bias")  # rows of words that were added to BERT's

REQUIRED = frozenset({"former/norm", "former/self_attention", "former/visual_attention", "former/query_mlp"})
LEFT_OVER = {
    "contrastive heads, which here read two pooled vectors": r"(vision|text)_proj\..*",
    "heads of stage 1": r"Qformer\.cls\..*|itm_head\..*|temp",
    "output words, tied to the word embedding": r"Qformer\.cls\.predictions\.decoder\..*",
    "position numbers": r".*\.position_ids",
    "another image encoder than config.stage.model.vision":
        r"vision_model\..*|visual_encoder\.(cls_token|pos_embed|patch_embed|blocks)\b.*",
    "a language model": r"language_(model|projection)\..*",
}
_FROM_HF = (
    (r"^qformer\.(bert|cls)\.", r"Qformer.\1."),
    (r"^(qformer\.)?(embeddings\.)?layernorm\.", f"{BERT}.embeddings.LayerNorm."),
    (r"^(qformer\.)?(embeddings|encoder)\.", rf"{BERT}.\2."),
    (r"attention\.attention\.", "attention.self."),
    (r"^(vision|text)_projection\.", r"\1_proj."),
)

_SETTINGS = "config.stage.model.connector.former"
_WIDTH = ("its image encoder is {0} wide (ViT-g: 1408): use the ViT-L checkpoint, blip2_pretrained_vitL.pth, or set "
          "config.stage.model.vision.width={0}")
_REMEDIES = (  # our path, the only axis that differs in the file, what to do
    (r"connector/image_norm/.*", 0, _WIDTH),
    (r".*/visual_attention/[kv]/kernel", 1, _WIDTH),
    (rf"{FORMER}/queries", 1, f"set {_SETTINGS}.visual_queries={{0}}"),
    (rf"{FORMER}/words/embedding|lm_head/bias", 0, f"set {_SETTINGS}.vocab_size to at least {{0}}"),
    (rf"{FORMER}/positions/embedding", 0, f"set {_SETTINGS}.max_positions={{0}}"),
)


def lavis_name(name: str) -> str:
  """LAVIS' name of a tensor that Hugging Face or LAVIS calls `name`."""
  for pattern, replacement in _FROM_HF:
    name = re.sub(pattern, replacement, name)
  return name


def recognises(names: set[str]) -> bool:
  """Whether a file with tensors of these names holds a Q-Former."""
  return any(lavis_name(name).startswith(f"{BERT}.") for name in names)


def find(path: epath.Path, model: ModelSettings, shapes: Shapes) -> Origin:
  """What the BLIP-2 weights at `path` have for a model with parameters of these shapes, every tensor accounted for.

  Raises:
    UserError: the file is not whole, or does not fit the model.
  """
  require_former(path, shapes)
  tensors = {}
  for name, tensor in read_tensors(path).items():
    tensors[lavis_name(name)] = tensor
  if eva_names.is_vit_g(model.vision):
    tensors = with_image_norm(eva_names.from_lavis(tensors))
  _check_structure(str(path), tensors, model)
  origin = account(str(path), tensors, entries(model, shapes), REQUIRED.__contains__, _remedy, LEFT_OVER)
  _check_tied(str(path), tensors)
  return origin


def require_former(path: epath.Path, shapes: Shapes) -> None:
  """Raises `UserError` for a model without a Q-Former."""
  require(f"{FORMER}/queries" in shapes, f"{path}: holds a Q-Former, which this model lacks; set "
                                         "config.stage.model.connector to a QFormerSettings")


def with_image_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The tensors, of which the norm behind ViT-g's blocks has LAVIS' name."""
  renamed = {}
  for name, tensor in tensors.items():
    renamed[eva_names.image_norm(name)] = tensor
  return renamed


def entries(model: ModelSettings, shapes: Shapes) -> dict[str, Entry]:
  """Which tensors, in LAVIS' names, make up our parameters. A parameter that BLIP-2 lacks has no entry."""
  former = model.connector.former
  found = Q_FORMER.entries(shapes, group=former.cross_attention_frequency)
  if eva_names.is_vit_g(model.vision):
    found |= eva_names.NAMES.entries(shapes, eva_names.PREFIX)
  else:
    found |= OPENAI_CLIP.entries(shapes, CLIP_PREFIX)
  found |= single_entries(shapes, _MODULES, _PARAMETERS)
  for path in _FEWER_ROWS:
    if path in found:
      found[path] = dataclasses.replace(found[path], fewer_rows=True)
  queries = found[f"{FORMER}/queries"]
  found[f"{FORMER}/queries"] = dataclasses.replace(queries, shape=(former.visual_queries, former.width))
  return found


def _check_structure(name: str, tensors: Mapping[str, Tensor], model: ModelSettings) -> None:
  """Checks what the names alone tell: how many layers there are, and which of them have cross-attention."""
  former, vision = model.connector.former, model.vision
  layers = _numbers(tensors, rf"{BERT}\.encoder\.layer\.(\d+)\.")
  require(bool(layers), f"{name}: no Q-Former in it; name BLIP-2's weights, such as LAVIS' blip2_pretrained_vitL.pth")
  require(former.activation == "gelu", f"{_SETTINGS}.activation={former.activation}: BLIP-2's weights, {name}, need "
                                       f"gelu; set {_SETTINGS}.activation=gelu")
  depth = layers[-1] + 1
  require(depth == former.layers, f"{name}: the Q-Former has {depth} layers, {_SETTINGS}.layers={former.layers}; set "
                                  f"{_SETTINGS}.layers={depth}")
  cross = _numbers(tensors, rf"{BERT}\.encoder\.layer\.(\d+)\.crossattention\.")
  frequency, ours = cross[1] - cross[0] if len(cross) > 1 else former.layers, former.cross_attention_frequency
  require(frequency == ours,
          f"{name}: cross-attention is in one layer of {frequency}, {_SETTINGS}.cross_attention_frequency={ours}; set "
          f"{_SETTINGS}.cross_attention_frequency={frequency}")
  blocks = _numbers(tensors, r"visual_encoder\.transformer\.resblocks\.(\d+)\.")
  depth = blocks[-1] + 1 if blocks else vision.layers
  require(depth == vision.layers, f"{name}: the image encoder has {depth} layers (BLIP-2 leaves CLIP's last out), "
                                  f"config.stage.model.vision.layers={vision.layers}; set "
                                  f"config.stage.model.vision.layers={depth}")


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
  numbers = set()
  for name in names:
    if match := re.match(pattern, name):
      numbers.add(int(match[1]))
  return sorted(numbers)


def _check_tied(path: str, tensors: Mapping[str, Tensor]) -> None:
  for copy, original in TIED.items():
    if copy in tensors and original in tensors and not np.array_equal(tensors[copy].read(), tensors[original].read()):
      logging.warning("%s: %s differs from %s; here they are one, and the latter is used", path, copy, original)


def _remedy(path: str, there: Shape, expected: Shape) -> str:
  """What to do about a tensor of shape `there` for our parameter `path`, which needs `expected`."""
  for pattern, axis, remedy in _REMEDIES:
    if re.fullmatch(pattern, path) and _differ_only_in(axis, there, expected):
      return remedy.format(there[axis])
  settings = "config.stage.model.vision" if component(path) == "vision" else _SETTINGS
  return f"make {settings} agree with the file"


def _differ_only_in(axis: int, there: Shape, expected: Shape) -> bool:
  same_rank = len(there) == len(expected)
  return same_rank and there[:axis] == expected[:axis] and there[axis + 1:] == expected[axis + 1:]
