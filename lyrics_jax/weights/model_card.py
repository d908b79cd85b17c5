"""The README of an exported directory: what was trained on what, by whose leave, and how to use it."""

import pathlib

import jinja2

from lyrics_jax.weights.llama_names import ADAPTER, is_lora
from lyrics_jax.weights.stored import StoredRun

TRAINING = "training"  # directory inside the exported one: the run's own configuration, and the manifest of its records


def render(template: str, run: StoredRun, apart: bool, **more) -> str:
  """Markdown with the hub's front matter.

  Args:
    template: name of a file beside this one.
    apart: whether the language model's weights are left out.
    more: what the template needs besides.
  """
  environment = jinja2.Environment(loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
                                   undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                   keep_trailing_newline=True)
  manifest = run.manifest
  return environment.get_template(template).render(
      config=run.config, model=run.config.stage.model, manifest=manifest, step=run.step, apart=apart, adapter=ADAPTER,
      refiner=manifest.refiner.get("name", "unnamed") if manifest else None, training=TRAINING,
      language_model=_language_model(run, apart), settings=run.config.to_json(), **more)


def _language_model(run: StoredRun, apart: bool) -> str:
  """How the language model was trained; empty for a model without one."""
  paths = [path for path in run.parameters.shapes if path.startswith("llm/")]
  if not paths:
    return ""
  trained = set(run.parameters.paths(trained=True))
  full = any(path in trained and not is_lora(path) for path in paths)
  words = "trained" if full else "frozen"
  if any(is_lora(path) for path in paths):
    words += f", with LoRA in {ADAPTER}/" if apart else ", with LoRA merged"
  return words
