"""Configurations of the tests of weights: those of `tiny`, with short names for the parts of the model."""

import tiny

from lyrics_jax.config import Config

_PLACES = {"vision": "stage__model__vision", "connector": "stage__model__connector",
           "former": "stage__model__connector__former", "local": "stage__model__connector__local",
           "llm": "stage__model__llm"}
# An image encoder that is built as BLIP-2's ViT-g.
VIT_G = {"vision__input_norm": False, "vision__patch_bias": True, "vision__activation": "gelu",
         "vision__norm_eps": 1e-6}
FULL = {"llm__lora": None, "stage__train": tiny.FULL}  # the whole language model is trained
FROZEN = {"llm__lora": None, "stage__train": ("connector/*",)}  # nothing of it is


def make_config(stage: str = "align", **changes) -> Config:
  """As `tiny.make_config`; `former__layers=4` stands for `stage__model__connector__former__layers=4`.

  Changes of a language model are left out where there is none.
  """
  whole = {}
  for name, value in changes.items():
    first, *rest = name.split("__")
    if stage != "align" or first != "llm":
      whole["__".join([_PLACES.get(first, first), *rest])] = value
  return tiny.make_config(stage, **whole)
