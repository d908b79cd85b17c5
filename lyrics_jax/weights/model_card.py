"""The README of an exported directory: what was trained on what, by whose leave, and how to use it."""

import pathlib

import jinja2

from lyrics_jax.config import Config
from lyrics_jax.weights import lyrics_names
from refiner_export.records.manifest import Manifest

_TEMPLATE = pathlib.Path(__file__).with_name("model_card.md.jinja")


def render(config: Config, manifest: Manifest | None, step: int, apart: bool) -> str:
  """Markdown with the hub's front matter.

  Args:
    manifest: of the records that it was trained on, None for weights that were not trained here.
    step: of the checkpoint.
    apart: without the language model's weights.
  """
  environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATE.parent), undefined=jinja2.StrictUndefined,
                                   trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
  return environment.get_template(_TEMPLATE.name).render(
      config=config, manifest=manifest, step=step, apart=apart, align=config.stage == "align",
      refiner=manifest.refiner.get("name", "unnamed") if manifest else None, adapter=lyrics_names.ADAPTER,
      training=lyrics_names.TRAINING, settings=config.to_json())
