"""Exchanges weights with Hugging Face.

`from-hf` reads published weights for a run to start from. `to-hf` writes a run as a model that transformers loads.
`check` compares the outputs of the two.
"""

from lyrics_jax.config import Config
from lyrics_jax.weights import sources
from refiner_export.common.command import Command, Commands, Flag


def from_hf(config: Config, output: str, **paths: str | None) -> None:
  """Writes a directory for `config.init_from`. `paths` are the files or directories of weights, by kind."""
  from lyrics_jax.weights.from_hf import convert
  given = {}
  for kind, path in paths.items():
    if path:
      given[kind] = path
  convert(config, given, output)


def to_hf(checkpoint: str, output: str, lora: str) -> None:
  """Writes the newest checkpoint of a run as a Hugging Face directory."""
  from lyrics_jax.weights.to_hf import export
  export(checkpoint, output, lora)


def check(checkpoint: str, hf: str) -> None:
  """Prints by how much the outputs of a run and of the directory made of it differ."""
  from lyrics_jax.weights.check import compare  # needs PyTorch, which a machine that trains may lack
  compare(checkpoint, hf)


def _kinds() -> tuple[Flag, ...]:
  flags = []
  for kind in sources.KINDS:
    flags.append(Flag(kind.name, kind.meaning, metavar="PATH"))
  return tuple(flags)


_CHECKPOINT = Flag("checkpoint", "output directory of a run", metavar="RUN", required=True)

FROM_HF = Command(
    name="lyrics_jax.convert from-hf",
    about="Writes a directory that a run of this configuration starts from, out of published weights.\n\n"
          "Every tensor is accounted for. What two of the files have is taken from the one that is listed first.",
    main=from_hf,
    config=Config,
    flags=(Flag("output", "the new directory, for config.init_from", metavar="DIR", required=True), *_kinds()),
    examples=("python -m lyrics_jax.convert from-hf --config configs/instruct_vicuna13b.py --clip DIR --llama DIR "
              "--blip2 PATH --output START",
              "python -m lyrics_jax.convert from-hf --config configs/ziya_lyrics_14b.py --ziya DIR --output START"),
)
TO_HF = Command(
    name="lyrics_jax.convert to-hf",
    about="Writes the newest checkpoint of a run as a model that transformers loads.",
    main=to_hf,
    flags=(_CHECKPOINT, Flag("output", "the new directory", metavar="DIR", required=True),
           Flag("lora", "add LoRA to the kernels, or keep it as an adapter", default="merge",
                choices=("merge", "adapter"))),
    examples=("python -m lyrics_jax.convert to-hf --checkpoint RUN --output DIR",),
)
CHECK = Command(
    name="lyrics_jax.convert check",
    about="Compares the outputs of a run and of the Hugging Face directory made of it, on the same inputs.",
    main=check,
    flags=(_CHECKPOINT, Flag("hf", "the directory that to-hf wrote", metavar="DIR", required=True)),
    examples=("python -m lyrics_jax.convert check --checkpoint RUN --hf DIR",),
)

COMMANDS = Commands(name="lyrics_jax.convert", about=__doc__,
                    commands={"from-hf": FROM_HF, "to-hf": TO_HF, "check": CHECK})

if __name__ == "__main__":
  COMMANDS.run()
