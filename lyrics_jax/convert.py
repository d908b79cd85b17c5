"""Exchanges weights with Hugging Face:

  python -m lyrics_jax.convert from-hf --config configs/x.py --clip DIR --llama DIR --blip2 PATH --output DIR
  python -m lyrics_jax.convert from-hf --config configs/x.py --ziya DIR --output DIR
  python -m lyrics_jax.convert to-hf --checkpoint RUN --output DIR [--lora merge|adapter]
  python -m lyrics_jax.convert check --checkpoint RUN --hf DIR

`from-hf` writes a directory that the run of this configuration starts from (`config.init_from`); every tensor is
accounted for. `to-hf` writes a run's newest checkpoint as a model that transformers loads. `check` compares the outputs
of the two.
"""

import sys

from absl import flags

from lyrics_jax import logs
from lyrics_jax.config import Config
from refiner_export.common import settings
from refiner_export.common.settings import require

SOURCES = {"clip": "CLIP: a Hugging Face directory or file", "llama": "LLaMA or Vicuna: a Hugging Face directory",
           "blip2": "BLIP-2 stage 1: LAVIS' .pth, or a Hugging Face directory",
           "ziya": "the published Lyrics weights: a directory of Ziya-Visual-Lyrics-14B; its refiner is written out too",
           "lyrics": "a directory that to-hf wrote"}


def from_hf() -> None:
  config = settings.define(Config)
  for kind, meaning in SOURCES.items():
    flags.DEFINE_string(kind, None, meaning)
  flags.DEFINE_string("output", None, "the new directory, for config.init_from")

  def main():
    from lyrics_jax.weights.from_hf import convert
    paths = {kind: flags.FLAGS[kind].value for kind in SOURCES if flags.FLAGS[kind].value}
    convert(config.value, paths, _required("output", "name the directory to write"))

  settings.run(main, config)


def to_hf() -> None:
  flags.DEFINE_string("checkpoint", None, "output directory of a run")
  flags.DEFINE_string("output", None, "the new directory")
  flags.DEFINE_enum("lora", "merge", ["merge", "adapter"], "LoRA is added to the kernels, or stays an adapter")

  def main():
    from lyrics_jax.weights.to_hf import export
    checkpoint = _required("checkpoint", "name the output directory of a run")
    export(checkpoint, _required("output", "name the directory to write"), flags.FLAGS.lora)

  settings.run(main)


def check() -> None:
  flags.DEFINE_string("checkpoint", None, "output directory of a run")
  flags.DEFINE_string("hf", None, "the directory that to-hf made of it")

  def main():
    from lyrics_jax.weights.check import compare
    checkpoint = _required("checkpoint", "name the output directory of a run")
    compare(checkpoint, _required("hf", "name a directory that to-hf wrote"))

  settings.run(main)


COMMANDS = {"from-hf": from_hf, "to-hf": to_hf, "check": check}


def _required(flag: str, remedy: str) -> str:
  value = flags.FLAGS[flag].value
  require(bool(value), f"--{flag} is required: {remedy}")
  return value


if __name__ == "__main__":
  logs.setup()
  command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
  if command not in COMMANDS:
    print(f"error: expected one of {', '.join(COMMANDS)}, got {command!r}: python -m lyrics_jax.convert from-hf --help",
          file=sys.stderr)
    sys.exit(2)
  COMMANDS[command]()
