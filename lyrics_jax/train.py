"""Trains one stage.

Started again, the run continues from the newest checkpoint in config.output. On a TPU slice the same command runs on
every host.
"""

from lyrics_jax.config import Config
from lyrics_jax.data.loader import open_records
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.training import hosts as processes
from lyrics_jax.training.evaluations import Evaluation
from lyrics_jax.training.loop import train as run_loop
from lyrics_jax.training.parameters import ModelParameters
from lyrics_jax.weights import sources
from lyrics_jax.weights.table import Origin
from refiner_export.common.command import Command, Flag


def train(config: Config, hosts: str | None = None) -> None:
  """Wires a run by hand: its records, where it starts from, what is measured on the way, and the loop."""
  processes.join(hosts)
  records = open_records(config.data)
  evaluations = []
  for settings in config.evaluations:
    measure = settings.build(config, records.manifest.fingerprint)
    evaluations.append(Evaluation(settings.name, settings.every, measure))

  def find_origin(parameters: ModelParameters) -> Origin | None:
    return sources.find(config.init_from, parameters) if config.init_from else None

  run_loop(config, records, find_origin, evaluations, LoadedModel)


COMMAND = Command(
    name="lyrics_jax.train", about=__doc__, main=train, config=Config,
    flags=(Flag("hosts", "how several processes find each other where they are no TPU slice: auto, or "
                         "ADDRESS:PORT,COUNT,INDEX"),),
    examples=("python -m lyrics_jax.train --config configs/quickstart_align.py --config.optimizer.peak_lr=3e-4",))

if __name__ == "__main__":
  COMMAND.run()
