"""BLIP-2's Q-Former (Li et al. 2023), from which the MQ-Former starts: the names of its weights.

Two layouts are read: LAVIS' (`blip2_pretrained_vitL.pth`, with CLIP's image encoder in OpenAI's names where the file has
one; `blip2_pretrained.pth`, of ViT-g) and Hugging Face's (`Blip2ForImageTextRetrieval`; `Blip2QFormerModel`,
`InstructBlipQFormerModel`). A ViT-g in the file is read where config.model.vision.kind = "eva". The table is in LAVIS'
names, but for ViT-g's (see `eva_names.py`); `lavis_name` translates the others. What BLIP-2 lacks (grounding queries and
their cross-attention, local tokens, the rows of added words) stays as initialised.
"""

import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from absl import logging
from etils import epath

from lyrics_jax.config import ModelConfig
from lyrics_jax.weights import eva_names
from lyrics_jax.weights.read import Tensor, read_tensors
from lyrics_jax.weights.table import FIRST, LEAVES, PATCH, PLAIN, THIRDS, Entry, Found, Source, account, part
from refiner_export.common.settings import require

FORMER, BERT = "perception/mq_former", "Qformer.bert"
VISION, CLIP = "perception/vision", "visual_encoder"
HEAD = "Qformer.cls.predictions"
TIED = {f"{HEAD}.decoder.weight": f"{BERT}.embeddings.word_embeddings.weight", f"{HEAD}.decoder.bias": f"{HEAD}.bias"}

# --- our modules -> theirs ---
_ATTENTION = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense", "norm": "output.LayerNorm"}
LAYER = ({f"self_attention/{ours}": f"attention.{theirs}" for ours, theirs in _ATTENTION.items()}
         | {f"visual_attention/{ours}": f"crossattention.{theirs}" for ours, theirs in _ATTENTION.items()}
         | {"query_mlp/up": "intermediate_query.dense", "query_mlp/down": "output_query.dense",
            "query_mlp/norm": "output_query.LayerNorm", "text_mlp/up": "intermediate.dense",
            "text_mlp/down": "output.dense", "text_mlp/norm": "output.LayerNorm"})
CLIP_BLOCK = {"attention_norm": "ln_1", "o": "attn.out_proj", "mlp_norm": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}
MODULES = {
    f"{FORMER}/words": f"{BERT}.embeddings.word_embeddings",
    f"{FORMER}/positions": f"{BERT}.embeddings.position_embeddings",
    f"{FORMER}/norm": f"{BERT}.embeddings.LayerNorm",
    "perception/image_norm": "ln_vision",
    "lm_head/dense": f"{HEAD}.transform.dense",
    "lm_head/norm": f"{HEAD}.transform.LayerNorm",
    "itm": "itm_head",
    f"{VISION}/input_norm": f"{CLIP}.ln_pre",
}

# --- our single parameters -> theirs ---
PARAMETERS = {
    f"{FORMER}/queries": ("query_tokens", FIRST),
    "lm_head/bias": (f"{HEAD}.bias", PLAIN),
    "temperature": ("temp", PLAIN),
    f"{VISION}/patch/kernel": (f"{CLIP}.conv1.weight", PATCH),
    f"{VISION}/class_token": (f"{CLIP}.class_embedding", PLAIN),
    f"{VISION}/positions": (f"{CLIP}.positional_embedding", PLAIN),
}

REQUIRED = frozenset(f"mq_former/{name}" for name in ("norm", "self_attention", "visual_attention", "query_mlp"))
LEFT_OVER = {
    "contrastive heads, which here read two pooled vectors": r"(vision|text)_proj\..*",
    "heads of stage 1": r"Qformer\.cls\..*|itm_head\..*|temp",
    "output words, tied to the word embedding": r"Qformer\.cls\.predictions\.decoder\..*",
    "position numbers": r".*\.position_ids",
    "another image encoder than config.model.vision": rf"vision_model\..*|{CLIP}\.(cls_token|pos_embed|patch_embed|blocks)\b.*",
    "a language model": r"language_(model|projection)\..*",
}
_FROM_HF = (
    (r"^qformer\.(bert|cls)\.", r"Qformer.\1."),
    (r"^(qformer\.)?(embeddings\.)?layernorm\.", f"{BERT}.embeddings.LayerNorm."),
    (r"^(qformer\.)?(embeddings|encoder)\.", rf"{BERT}.\2."),
    (r"attention\.attention\.", "attention.self."),
    (r"^(vision|text)_projection\.", r"\1_proj."),
)

_WIDTH = ("its image encoder is {0} wide (ViT-g: 1408): use the ViT-L checkpoint, blip2_pretrained_vitL.pth, or set "
          "config.model.vision.width={0}")
_REMEDIES = (  # our path, the only axis that differs in the file, what to do
    (r"perception/image_norm/.*", 0, _WIDTH),
    (r".*/visual_attention/[kv]/kernel", 1, _WIDTH),
    (rf"{FORMER}/queries", 1, "set config.model.mq_former.visual_queries={0}"),
    (rf"{FORMER}/words/embedding|lm_head/bias", 0, "set config.model.mq_former.vocab_size to at least {0}"),
    (rf"{FORMER}/positions/embedding", 0, "set config.model.mq_former.max_positions={0}"),
)


def lavis_name(name: str) -> str:
  """LAVIS' name of a tensor that Hugging Face or LAVIS calls `name`."""
  for pattern, replacement in _FROM_HF:
    name = re.sub(pattern, replacement, name)
  return name


def find(path: epath.Path, config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Source:
  """What the BLIP-2 weights at `path` have for a model with parameters of these shapes, every tensor accounted for.

  Raises `UserError` where the file or the configuration stands in the way.
  """
  tensors = {lavis_name(name): tensor for name, tensor in read_tensors(path).items()}
  if config.vision.kind == "eva":
    tensors = {eva_names.image_norm(name): tensor for name, tensor in eva_names.from_lavis(tensors).items()}
  _check_structure(str(path), tensors, config)
  entries = q_former_entries(config, shapes)
  source = account(str(path), tensors, entries, REQUIRED.__contains__, _remedy, LEFT_OVER)
  _check_tied(str(path), tensors)
  return source


def load(path: epath.Path, config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Found:
  """As `find`, read; nothing is loaded by halves."""
  return find(path, config, shapes).found()


def q_former_entries(config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Entry]:
  """Which tensors, in LAVIS' names, make up each of our parameters that BLIP-2 has."""
  return {path: entry for path, shape in shapes.items() if (entry := _entry(path, shape.shape, config)) is not None}


def _entry(path: str, shape: tuple[int, ...], config: ModelConfig) -> Entry | None:
  """Which tensors make up our parameter `path`; None where BLIP-2 has nothing like it."""
  if path.startswith(f"{VISION}/") and config.vision.kind == "eva":
    return eva_names.entry(path, shape, config.vision)
  if path in PARAMETERS:
    name, form = PARAMETERS[path]
    shape = (config.mq_former.visual_queries, *shape[1:]) if form is FIRST else shape
    return Entry((name,), form, shape, fewer_rows=path == "lm_head/bias")
  module, _, leaf = path.rpartition("/")
  if leaf not in LEAVES:
    return None
  suffix, form = LEAVES[leaf]
  if module in MODULES:
    return Entry((f"{MODULES[module]}.{suffix}",), form, shape, fewer_rows=module == f"{FORMER}/words")
  if match := re.fullmatch(rf"{FORMER}/stack/blocks/layers/(\d+)/(.*)", module):
    first, inner = int(match[1]), match[2]  # the layer's place in its group
    numbers = range(first, config.mq_former.layers, config.mq_former.cross_attention_frequency)
    names = tuple(f"{BERT}.encoder.layer.{n}.{LAYER[inner]}.{suffix}" for n in numbers) if inner in LAYER else ()
  elif match := re.fullmatch(rf"{VISION}/stack/blocks/(.*)", module):
    theirs = f"attn.in_proj_{suffix}" if match[1] in THIRDS else f"{CLIP_BLOCK[match[1]]}.{suffix}"
    form = THIRDS.get(match[1], form)
    names = tuple(f"{CLIP}.transformer.resblocks.{n}.{theirs}" for n in range(config.vision.layers))
  else:
    names = ()
  return Entry(names, form, shape[1:], stacked=True) if names else None


def _check_structure(source: str, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
  """What the names alone tell: layers, and which of them have cross-attention."""
  former, vision = config.mq_former, config.vision
  layers = _numbers(tensors, rf"{BERT}\.encoder\.layer\.(\d+)\.")
  require(bool(layers), f"{source}: no Q-Former in it; name BLIP-2's weights, such as LAVIS' blip2_pretrained_vitL.pth")
  require(former.activation == "gelu", f"config.model.mq_former.activation={former.activation}: BLIP-2's weights, "
                                       f"{source}, need gelu; set config.model.mq_former.activation=gelu")
  depth = layers[-1] + 1
  require(depth == former.layers, f"{source}: the Q-Former has {depth} layers, config.model.mq_former.layers="
                                  f"{former.layers}; set config.model.mq_former.layers={depth}")
  cross = _numbers(tensors, rf"{BERT}\.encoder\.layer\.(\d+)\.crossattention\.")
  frequency = cross[1] - cross[0] if len(cross) > 1 else former.layers
  require(frequency == former.cross_attention_frequency,
          f"{source}: cross-attention is in one layer of {frequency}, config.model.mq_former.cross_attention_frequency="
          f"{former.cross_attention_frequency}; set config.model.mq_former.cross_attention_frequency={frequency}")
  blocks = _numbers(tensors, rf"{CLIP}\.transformer\.resblocks\.(\d+)\.")
  depth = blocks[-1] + 1 if blocks else vision.layers
  require(depth == vision.layers, f"{source}: the image encoder has {depth} layers (BLIP-2 leaves CLIP's last out), "
                                  f"config.model.vision.layers={vision.layers}; set config.model.vision.layers={depth}")


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
  return sorted({int(match[1]) for name in names if (match := re.match(pattern, name))})


def _check_tied(source: str, tensors: Mapping[str, Tensor]) -> None:
  for copy, original in TIED.items():
    if copy in tensors and original in tensors and not np.array_equal(tensors[copy].read(), tensors[original].read()):
      logging.warning("%s: %s differs from %s; here they are one, and the latter is used", source, copy, original)


def _remedy(path: str, there: tuple[int, ...], expected: tuple[int, ...]) -> str:
  """What to do about a tensor of shape `there` for our parameter `path`, which needs `expected`."""
  for pattern, axis, remedy in _REMEDIES:
    others = lambda shape: shape[:axis] + shape[axis + 1:]
    if re.fullmatch(pattern, path) and len(there) == len(expected) and others(there) == others(expected):
      return remedy.format(there[axis])
  return f"make config.model.{'vision' if part(path) == 'vision' else 'mq_former'} agree with the file"
