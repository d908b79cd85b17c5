"""The names of our parameters in a directory that `to_hf` wrote of a Lyrics model: one table, read in both directions.

The parts have the names of the published ones: `vision_model.*` as in CLIP's files, `language_model.*` as in LLaMA's
  files
with that prefix, and the adapter in `adapter/` as PEFT writes it. The MQ-Former keeps its names here, one module per
layer instead of the stacks that JAX scans over.

    DIR/model.safetensors, or shards and their index    `entries`
    DIR/adapter/adapter_model.safetensors               `llama_names.adapter_entries`; only where LoRA was not merged
    DIR/training/config.json, manifest.json             the run's own configuration, and the manifest of its records
"""

from etils import epath

from lyrics_jax.models.base import ModelSettings
from lyrics_jax.models.layers.int8 import SCALE
from lyrics_jax.weights import clip_names
from lyrics_jax.weights import llama_names
from lyrics_jax.weights.llama_names import ADAPTER, ADAPTER_FILE
from lyrics_jax.weights.table import PLAIN, Entry, Names, Origin, Shape, Shapes, account, single_entries
from refiner_export.common.settings import require
from refiner_export.common.weight_files import read_tensors

LANGUAGE_PREFIX = "language_model."
_FORMER_PREFIX = "mq_former."


def _former_layer() -> dict[str, str]:
  """The modules of a layer of the MQ-Former, whose names differ from ours by the dots only."""
  modules = []
  for attention in ("self_attention", "visual_attention", "grounding_attention"):
    modules += [f"{attention}/{name}" for name in ("q", "k", "v", "o", "norm")]
  for mlp in ("query_mlp", "text_mlp"):
    modules += [f"{mlp}/{name}" for name in ("up", "down", "norm")]
  return {module: module.replace("/", ".") + "." for module in modules}


FORMER = Names(
    "connector/former",
    parameters={"queries": ("queries", PLAIN)},
    modules={"words": "words", "positions": "positions", "norm": "norm"},
    layers="layers",
    layer=_former_layer())
# Parameters and modules outside the image encoder, the MQ-Former and the language model.
_PARAMETERS = {"connector/local_tokens/source": "local_tokens.source", "temperature": "temperature"}
_MODULES = {
    "connector/image_norm": "image_norm",
    "connector/local_tokens/detection": "local_tokens.detection",
    "connector/local_tokens/mask": "local_tokens.mask",
    "connector/projection": "projection",
    "itc_image": "itc_image",
    "itc_text": "itc_text",
    "itm": "itm",
    "lm_head": "lm_head",  # its bias
    "lm_head/dense": "lm_head.dense",
    "lm_head/norm": "lm_head.norm",
}


def entries(model: ModelSettings, shapes: Shapes) -> dict[str, Entry]:
  """Where model.safetensors has our parameters. LoRA's are not there, nor the scales of int8 kernels.

  Args:
    model: settings of the model whose parameters they are; its connector is a `QFormerSettings`.
    shapes: of the parameters, by path.
  """
  found = clip_names.NAMES.entries(shapes, clip_names.PREFIX)
  found |= FORMER.entries(shapes, _FORMER_PREFIX, model.connector.former.cross_attention_frequency)
  found |= llama_names.entries(shapes, LANGUAGE_PREFIX)
  found |= single_entries(shapes, _MODULES, _PARAMETERS)
  for path in shapes:
    assert path in found or llama_names.is_lora(path) or path.endswith(SCALE), path
  return found


def recognises(names: set[str]) -> bool:
  """Whether a file with tensors of these names is of a directory that `to_hf` wrote of a Lyrics model."""
  return f"{_FORMER_PREFIX}queries" in names


def find(path: epath.Path, model: ModelSettings, shapes: Shapes) -> Origin:
  """What an exported directory has for a model with parameters of these shapes, bit by bit.

  Where LoRA was merged, the adapters are initialised: they add nothing. Where LoRA was not merged, the language model's
  weights are not in the directory, and come from another origin.

  Raises:
    UserError: the directory is not whole, or does not fit the model.
  """
  require("connector/former/queries" in shapes, f"{path}: holds an MQ-Former, which this model lacks; set "
                                                "config.stage.model.connector to a QFormerSettings")
  tensors, ours = read_tensors(path), entries(model, shapes)
  if not any(name.startswith(LANGUAGE_PREFIX) for name in tensors):
    ours = {name: entry for name, entry in ours.items() if not name.startswith("llm/")}
  adapter = path / ADAPTER / ADAPTER_FILE
  if adapter.exists():
    tensors |= read_tensors(adapter)
    ours |= llama_names.adapter_entries(shapes)
  return account(str(path), tensors, ours, _required, _remedy, {})


def _required(component: str) -> bool:
  return component != "llm"


def _remedy(path: str, there: Shape, needed: Shape) -> str:
  return "make config.stage.model agree with the directory"
